-- ARGV: position, tag, limit. Answers the entries after the position.
local known = redis.call('HMGET', record, '#x', '#h')
if not known[1] then return 'gone' end
local position, tag, limit = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local last, _, count = head(known[2])
if position > last then return 'diverged' end
-- An eviction may take the log and leave the record; an append then starts the log anew. Either shows here.
if redis.call('XLEN', log) ~= count then return 'diverged' end
if position == 0 or tag == '' then
  return redis.call('XRANGE', log, '0-' .. (position + 1), '+', 'COUNT', limit)
end
local entries = redis.call('XRANGE', log, '0-' .. position, '+', 'COUNT', limit + 1)
if not entries[1] or entries[1][1] ~= '0-' .. position then
  local left = redis.call('XRANGE', log, '-', '+', 'COUNT', 1)
  return {'trimmed', left[1] and left[1][1] or '0-0'}
end
if entries[1][2][2] ~= tag then return 'diverged' end
table.remove(entries, 1)
return entries
