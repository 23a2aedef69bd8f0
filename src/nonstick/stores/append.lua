-- ARGV: channel, writer, sequence, stream, attempt, flags ("t" takes over, "e" ends the stream), then optional names,
-- each "" or "=" .. name: answers, settle, cancel, uncancel; then the numbers of names to expect, fields to set,
-- fields to remove; then these; then (tag, data) of each event.
local channel, writer, sequence = ARGV[1], ARGV[2], ARGV[3]
local stream, attempt, flags = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local answers, settle, cancel, uncancel = ARGV[7], ARGV[8], ARGV[9], ARGV[10]
local expects, sets, removes = tonumber(ARGV[11]), tonumber(ARGV[12]), tonumber(ARGV[13])

local known = redis.call('HMGET', record, '#x', '#h', '#b')
if not known[1] then return refuse('gone') end
local _, expires = span(known[1])
local position, size, count, tag = head(known[2])
local now = clock()
local book = redis.call('HMGET', books, '#p', 'w' .. writer, 's' .. ARGV[4],
  'p' .. string.sub(answers, 2), 'p' .. string.sub(settle, 2))
if known[3] and not book[1] then position, size, count, tag = lose_log(position) end

-- First of all: has this been written? One outstanding append per writer means that a lower sequence than the last is
-- a late copy of an append that was settled long ago, so it is never written either. For one that is so old that its
-- position was forgotten, the answer is where the next one that is known began.
local history, written = '', 0
if writer ~= '' and book[2] then
  history = string.match(book[2], '^%d+ %d+ (.*)$')
  written = tonumber(string.match(history, '^(%d+):'))
  if tonumber(sequence) <= written then
    local first
    for number, start in string.gmatch(history, '(%d+):(%d+)') do
      if tonumber(number) >= tonumber(sequence) then first = tonumber(start) end
    end
    written_again(known[1])
    return {first, 1, size, count}
  end
end

if stream > 0 then
  if not book[3] then return refuse('closed') end
  local current, ended = string.match(book[3], '^(%d+) (%d+)$')
  if ended ~= '0' then return refuse('closed') end
  if tonumber(current) ~= attempt then return refuse('fenced') end
  -- A writer has one append outstanding: what lies between its last and this one was written, and is lost.
  if writer ~= '' and tonumber(sequence) ~= written + 1 then return refuse('diverged') end
end
if (answers ~= '' and not book[4]) or (settle ~= '' and not book[5]) then return refuse('not pending') end

local at = 14
local set = {}
for i = at, at + expects - 1 do
  set[#set + 1] = 'p' .. ARGV[i]
  set[#set + 1] = '1'
end
at = at + expects
local fields = at
at = at + 2 * sets + removes

-- The events come first among the writes: what a full memory refuses is then refused before anything was written.
local events = (#ARGV - at + 1) / 2
local first = position
if events > 0 then
  first = position + 1
  if stream == -1 then stream = first end
end
local total = 0
for i = at, #ARGV, 2 do
  local id = '0-' .. (position + 1)
  if not redis.call('XADD', log, 'NOMKSTREAM', id, 't', ARGV[i], 's', stream, 'd', ARGV[i + 1]) then
    redis.call('XADD', log, id, 't', ARGV[i], 's', stream, 'd', ARGV[i + 1])
    redis.call('PEXPIREAT', log, expires)
    if count > 0 then
      -- An eviction took the log. It starts anew here, and read.lua reports what is missing.
      redis.call('HSET', record, '#d', string.format('%d ', position) .. tag)
      size, count = 0, 0
    end
  end
  position, tag = position + 1, ARGV[i]
  total = total + #ARGV[i + 1]
end
size, count = size + total, count + events

if events > 0 then set_head(position, size, count, tag) end
for i = fields, fields + 2 * sets - 1, 2 do redis.call('HSET', record, 'f' .. ARGV[i], ARGV[i + 1]) end
for i = fields + 2 * sets, at - 1 do redis.call('HDEL', record, 'f' .. ARGV[i]) end
if cancel ~= '' then
  local mine, left = '#c' .. string.sub(cancel, 2), {}
  for _, name in ipairs(redis.call('HKEYS', record)) do
    if string.sub(name, 1, 2) == '#c' and name ~= mine then
      local till = tonumber(redis.call('HGET', record, name))
      if till <= now then redis.call('HDEL', record, name) else left[#left + 1] = {till, name} end
    end
  end
  table.sort(left, function(one, other) return one[1] < other[1] end)
  for i = 1, #left - MAX_CANCELS + 1 do redis.call('HDEL', record, left[i][2]) end
  redis.call('HSET', record, mine, now + CANCEL_MS)
end
if uncancel ~= '' then redis.call('HDEL', record, '#c' .. string.sub(uncancel, 2)) end

if stream > 0 and (ARGV[4] == '-1' or flags ~= '') then
  if string.find(flags, 't', 1, true) then attempt = attempt + 1 end
  local ended = 0
  if string.find(flags, 'e', 1, true) then ended = position end
  set[#set + 1] = 's' .. stream
  set[#set + 1] = string.format('%d %d', attempt, ended)
end
if writer ~= '' then
  -- The last is what a repeat asks for; a few more for a copy that the network delivers late.
  history = string.match(history, '^%S+ %S+ %S+ %S+ %S+ %S+ %S+') or history
  set[#set + 1] = 'w' .. writer
  set[#set + 1] = string.format('%d %d %s:%d ', now, stream, sequence, first) .. history
end
if settle ~= '' then redis.call('HDEL', books, 'p' .. string.sub(settle, 2)) end
if not book[1] and #set > 0 then
  set[#set + 1] = '#p'
  set[#set + 1] = string.format('%d', now + WRITER_MS)
end
if #set > 0 then redis.call('HSET', books, unpack(set)) end
if not book[1] then redis.call('PEXPIREAT', books, expires) end
if #set > 0 and (not known[3] or not book[1]) then redis.call('HSET', record, '#b', '1') end
if book[1] and tonumber(book[1]) <= now then forget_writers(now) end

if events > 0 then
  local message = 'more'
  if total <= INLINE_BYTES then
    local sizes, blobs = {}, {}
    for i = at, #ARGV do
      sizes[#sizes + 1] = #ARGV[i]
      blobs[#blobs + 1] = ARGV[i]
    end
    message = string.format('1 %d %d %s\n', first, stream, table.concat(sizes, ' ')) .. table.concat(blobs)
  end
  redis.call('PUBLISH', channel, message)
end
return {first, 0, size, count}
