-- ARGV: prefix, member, new lifetime in ms or 0; number of fields that must have a value, that must be absent, that are
-- set, that are removed; then these, the first and third kind with their values.
if redis.call('HEXISTS', record, '#x') == 0 then return gone() end
local has, lacks, sets = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local at = 8
for _ = 1, has do
  if redis.call('HGET', record, 'f' .. ARGV[at]) ~= ARGV[at + 1] then return refuse(0) end
  at = at + 2
end
for _ = 1, lacks do
  if redis.call('HEXISTS', record, 'f' .. ARGV[at]) == 1 then return refuse(0) end
  at = at + 1
end
if ARGV[3] ~= '0' then renew(ARGV[1], ARGV[2], redis.call('HGET', record, '#g'), tonumber(ARGV[3]), clock()) end
for _ = 1, sets do
  redis.call('HSET', record, 'f' .. ARGV[at], ARGV[at + 1])
  at = at + 2
end
for i = at, #ARGV do redis.call('HDEL', record, 'f' .. ARGV[i]) end
return 1
