-- ARGV: position before which the standalone stream is dropped, then streams.
local known = redis.call('HMGET', record, '#x', '#h')
if not known[1] then return gone() end
local position, size, count, tag = head(known[2])
local before = tonumber(ARGV[1])
local PAGE = 16

-- Where the entries to drop may lie: a stream begins at the position that is its name and ends at its terminal.
local closed, from, to = {}, position + 1, 0
if before > 1 then from, to = 1, before - 1 end
for i = 2, #ARGV do
  local ended = string.match(redis.call('HGET', books, 's' .. ARGV[i]) or '', '^%d+ (%d+)$')
  if ended and ended ~= '0' then
    closed[ARGV[i]] = true
    from, to = math.min(from, tonumber(ARGV[i])), math.max(to, tonumber(ended))
  end
end

-- In pages of a few: an entry may be as large as a message, and is in memory here meanwhile.
while from <= to do
  local page = redis.call('XRANGE', log, '0-' .. from, '0-' .. to, 'COUNT', PAGE)
  local ids = {}
  for _, entry in ipairs(page) do
    from = tonumber(string.sub(entry[1], 3)) + 1
    local stream = entry[2][4]
    if closed[stream] or (stream == '0' and from <= before) then
      ids[#ids + 1] = entry[1]
      size = size - #entry[2][6]
    end
  end
  if #ids > 0 then count = count - redis.call('XDEL', log, unpack(ids)) end
  if #page < PAGE then break end
end

-- An empty stream still holds kilobytes; positions go on from the head, not from this key.
if count == 0 then redis.call('DEL', log) end
if position > 0 then set_head(position, size, count, tag) end
for stream in pairs(closed) do redis.call('HDEL', books, 's' .. stream) end
return 'ok'
