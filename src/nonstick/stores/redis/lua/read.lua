-- ARGV: position, tag, limit, bytes, and optionally a number of bytes after which each entry's data are cut off. Answers the
-- entries after the position: the first, and more while their data are together no more than so many bytes. Those that are
-- cut off have a fourth pair, their size.
local known = redis.call('HMGET', record, '#x', '#h', '#d', '#b')
if not known[1] then return gone() end
local position, tag, limit = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local last, size, count, last_tag = head(known[2])
if known[4] and redis.call('EXISTS', books) == 0 then
  last, size, count, last_tag = lose_log(last)
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

-- How large an entry is, is known only once it is in memory here, and a script holds up everybody. So a log of more than so
-- many bytes is fetched in small pages, the first of one entry.
local most, clip = tonumber(ARGV[4]), tonumber(ARGV[5])
local checked = position > 0 and tag ~= ''
local from = checked and position or position + 1
local page = size <= most and limit + 1 or 1
local taken, bytes = {}, 0
repeat
  local entries = redis.call('XRANGE', log, '0-' .. from, '+', 'COUNT', math.min(page, limit - #taken + (checked and 1 or 0)))
  local whole = #entries > 0
  if checked then
    if not whole or entries[1][1] ~= '0-' .. position then
      local left = redis.call('XRANGE', log, '-', '+', 'COUNT', 1)
      return refuse({'trimmed', left[1] and left[1][1] or '0-0'})
    end
    if entries[1][2][2] ~= tag then return refuse('diverged') end
    table.remove(entries, 1)
    checked, from = false, position + 1
  end
  for _, entry in ipairs(entries) do
    local pairs_of, length = entry[2], #entry[2][6]
    bytes = bytes + length
    if #taken > 0 and bytes > most then return taken end
    from = tonumber(string.sub(entry[1], 3)) + 1
    if clip then pairs_of[6], pairs_of[7], pairs_of[8] = string.sub(pairs_of[6], 1, clip), 'n', length end
    taken[#taken + 1] = entry
  end
  page = math.min(page * 2, 4)
until not whole or #taken == limit or from > last
return taken
