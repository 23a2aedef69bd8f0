-- ARGV: channel, writer, sequence, stream, attempt, flags: "t" takes over, "e" ends the stream, "x" there are more parts.
-- With "x" optional names, each "" or "=" .. name: answers, settle, cancel, uncancel; then the numbers of names to
-- expect, fields to set, fields to remove; then these. Then (tag, data) of each event.
--
-- Most of an append's time on the server is spent in here, not in the commands. So numbers stay text where they are only
-- compared for equality or passed on (all are written alike, by %d), and arithmetic converts the others: tonumber() takes
-- twice as long. Nothing is asked for that the batch does not need.
local channel, writer, sequence, stream, attempt, flags = unpack(ARGV, 1, 6)
local answers, settle, cancel, uncancel = '', '', '', ''
local expects, sets, removes = 0, 0, 0
local at = 7
if flags ~= '' and string.find(flags, 'x', 1, true) then
  answers, settle, cancel, uncancel = unpack(ARGV, 7, 10)
  expects, sets, removes = ARGV[11] + 0, ARGV[12] + 0, ARGV[13] + 0
  at = 14
end
local opens = stream == '-1'
local continues = not opens and stream ~= '0'
local mine = 'w' .. writer

local known = redis.call('HMGET', record, '#x', '#h', '#b')
if not known[1] then return gone() end
local position, size, count, tag = head(known[2])
local now = clock()
local book
if continues then
  book = redis.call('HMGET', books, '#p', mine, 's' .. stream)
else
  book = redis.call('HMGET', books, '#p', mine)
end
if known[3] and not book[1] then position, size, count, tag = lose_log(position) end

-- First of all: has this been written? One outstanding append per writer means that a lower sequence than the last is
-- a late copy of an append that was settled long ago, so it is never written either. For one that is so old that its
-- position was forgotten, the answer is where the next one that is known began.
local history, written = '', 0
if writer ~= '' and book[2] then
  history, written = string.match(book[2], '^%d+ %d+ ((%d+):.*)$')
  if sequence - written <= 0 then
    local first
    for number, start in string.gmatch(history, '(%d+):(%d+)') do
      if number - sequence >= 0 then first = tonumber(start) end
    end
    written_again(known[1])
    return {first, 1, size, count}
  end
end

if continues then
  if not book[3] then return refuse('closed') end
  local current, ended = string.match(book[3], '^(%d+) (%d+)$')
  if ended ~= '0' then return refuse('closed') end
  if current ~= attempt then return refuse('fenced') end
  -- A writer has one append outstanding: what lies between its last and this one was written, and is lost.
  if writer ~= '' and sequence - written ~= 1 then return refuse('diverged') end
end
local function waits(id)
  return id == '' or redis.call('HEXISTS', books, 'p' .. string.sub(id, 2)) == 1
end
if not waits(answers) or not waits(settle) then return refuse('not pending') end

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
  if opens then stream = string.format('%d', first) end
end
local total, sizes = 0, {}
local before = tag
for i = at, #ARGV, 2 do
  local data = ARGV[i + 1]
  local id = string.format('0-%d', position + 1)
  if not redis.call('XADD', log, 'NOMKSTREAM', id, 't', ARGV[i], 's', stream, 'd', data) then
    redis.call('XADD', log, id, 't', ARGV[i], 's', stream, 'd', data)
    redis.call('PEXPIREAT', log, expires_of(known[1]))
    if count > 0 then
      -- An eviction took the log. It starts anew here, and read.lua reports what is missing.
      redis.call('HSET', record, '#d', string.format('%d ', position) .. tag)
      size, count = 0, 0
    end
  end
  position, tag = position + 1, ARGV[i]
  total = total + #data
  sizes[#sizes + 1] = string.format(' %d %d', #tag, #data)
end
size, count = size + total, count + events

if events > 0 then set_head(position, size, count, tag) end
for i = fields, fields + 2 * sets - 1, 2 do redis.call('HSET', record, 'f' .. ARGV[i], ARGV[i + 1]) end
for i = fields + 2 * sets, at - 1 do redis.call('HDEL', record, 'f' .. ARGV[i]) end
if cancel ~= '' then
  local name_of_this, left = '#c' .. string.sub(cancel, 2), {}
  for _, name in ipairs(redis.call('HKEYS', record)) do
    if string.sub(name, 1, 2) == '#c' and name ~= name_of_this then
      local till = tonumber(redis.call('HGET', record, name))
      if till <= now then redis.call('HDEL', record, name) else left[#left + 1] = {till, name} end
    end
  end
  table.sort(left, function(one, other) return one[1] < other[1] end)
  for i = 1, #left - MAX_CANCELS + 1 do redis.call('HDEL', record, left[i][2]) end
  redis.call('HSET', record, name_of_this, now + CANCEL_MS)
end
if uncancel ~= '' then redis.call('HDEL', record, '#c' .. string.sub(uncancel, 2)) end

local ends = flags ~= '' and string.find(flags, 'e', 1, true)
local taken = flags ~= '' and string.find(flags, 't', 1, true)
if opens or (continues and (ends or taken)) then
  set[#set + 1] = 's' .. stream
  set[#set + 1] = string.format('%d %d', attempt + (taken and 1 or 0), ends and position or 0)
end
if writer ~= '' then
  -- The last is what a repeat asks for; a few more for a copy that the network delivers late.
  history = string.match(history, '^%S+ %S+ %S+ %S+ %S+ %S+ %S+') or history
  set[#set + 1] = mine
  set[#set + 1] = string.format('%d %s %s:%d ', now, stream, sequence, first) .. history
end
if settle ~= '' then redis.call('HDEL', books, 'p' .. string.sub(settle, 2)) end
if not book[1] and #set > 0 then
  set[#set + 1] = '#p'
  set[#set + 1] = string.format('%d', now + WRITER_MS)
end
if #set > 0 then redis.call('HSET', books, unpack(set)) end
if not book[1] then redis.call('PEXPIREAT', books, expires_of(known[1])) end
if #set > 0 and (not known[3] or not book[1]) then redis.call('HSET', record, '#b', '1') end
if book[1] and now - book[1] >= 0 then forget_writers(now) end

if events > 0 then
  local message = 'more'
  if total <= INLINE_BYTES then
    -- "1", from 0.1, is the same without the tag of the entry before. Each takes the other's for "more".
    message = string.format('2 %d %s %d', first, stream, #before) .. table.concat(sizes) .. '\n' .. before
      .. table.concat(ARGV, '', at)
  end
  redis.call('PUBLISH', channel, message)
end
return {first, 0, size, count}
