-- ARGV: prefix, member, lifetime ms, number of groups, then (group, limit) each, then (field, value) each. Without a
-- prefix the limits were seen to before: see index() in shared.lua.
local known = redis.call('HGET', record, '#x')
if known then
  written_again(known)
  return refuse('exists')
end
local prefix, member, lifetime, groups = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local now = clock()
local names = {}
for i = 1, groups do
  local group, limit = ARGV[3 + 2 * i], tonumber(ARGV[4 + 2 * i])
  local key = prefix .. ':g:' .. group
  if prefix ~= '' and redis.call('ZCOUNT', key, now, '+inf') >= limit then return refuse({'full', group}) end
  names[i] = group
end
-- The first write is one that a full memory refuses: after any other the server would let the rest of the script pass.
renew(prefix, member, table.concat(names, '\n'), lifetime, now)
for i = 5 + 2 * groups, #ARGV, 2 do redis.call('HSET', record, 'f' .. ARGV[i], ARGV[i + 1]) end
if groups > 0 then redis.call('HSET', record, '#g', table.concat(names, '\n')) end
if prefix == '' then names = {} end
for _, group in ipairs(names) do redis.call('ZREMRANGEBYSCORE', prefix .. ':g:' .. group, '-inf', '(' .. now) end
-- What an eviction may have left of an earlier session under this key.
redis.call('DEL', books, log)
return 'ok'
