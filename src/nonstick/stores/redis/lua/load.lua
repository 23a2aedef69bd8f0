-- ARGV: prefix, member, share of the lifetime after which the expiry is renewed. Answers the time, the whole record, and,
-- if it was renewed, the lifetime.
local all = redis.call('HGETALL', record)
local lifetime, expires, groups
for i = 1, #all, 2 do
  if all[i] == '#x' then lifetime, expires = span(all[i + 1]) end
  if all[i] == '#g' then groups = all[i + 1] end
end
if not lifetime then return gone() end
local now = clock()
local fresh = expires - now >= lifetime * (1 - tonumber(ARGV[3]))
if not fresh then renew(ARGV[1], ARGV[2], groups, lifetime, now) end
return {now, all, fresh and 0 or lifetime}
