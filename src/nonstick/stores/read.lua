-- ARGV: position, tag, limit. Answers the entries after the position.
local known = redis.call('HMGET', record, '#x', '#h', '#d', '#b')
if not known[1] then return refuse('gone') end
local position, tag, limit = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local last, _, count, last_tag = head(known[2])
if known[4] and redis.call('EXISTS', books) == 0 then
  last, _, count, last_tag = lose_log(last)
  known[3] = last .. ' '
end
if position > last then return refuse('diverged') end
-- An eviction may have taken the log and left the record. Whoever has all of it has lost nothing; nobody else reads on,
-- but whoever begins at the beginning, and so has nothing that could be continued.
if redis.call('XLEN', log) ~= count then
  if position == 0 or (position == last and (tag == '' or tag == last_tag)) then return {} end
  return refuse('diverged')
end
if known[3] then
  -- That happened, and the log was started anew after this position.
  local lost, lost_tag = string.match(known[3], '^(%d+) (.*)$')
  lost = tonumber(lost)
  if (position > 0 and position < lost) or (position == lost and tag ~= '' and tag ~= lost_tag) then return refuse('diverged') end
  if position == lost then tag = '' end
end
if position == 0 or tag == '' then
  return redis.call('XRANGE', log, '0-' .. (position + 1), '+', 'COUNT', limit)
end
local entries = redis.call('XRANGE', log, '0-' .. position, '+', 'COUNT', limit + 1)
if not entries[1] or entries[1][1] ~= '0-' .. position then
  local left = redis.call('XRANGE', log, '-', '+', 'COUNT', 1)
  return refuse({'trimmed', left[1] and left[1][1] or '0-0'})
end
if entries[1][2][2] ~= tag then return refuse('diverged') end
table.remove(entries, 1)
return entries
