-- Stands before every script. Lines before it define CANCEL_MS, WRITER_MS, INLINE_BYTES, MAX_CANCELS and ALONE.
--
-- KEYS of every script about one session (all in one hash slot, by the {key} in their names):
--   1 record, a hash: "f" .. name = a field; "#x" = "<lifetime ms> <expires ms>"; "#g" = its groups, one a line;
--     "#h" = "<position> <size> <count> <tag>", absent before the first append; "#c" .. request key = the time in ms
--     up to which this cancel counts; "#d" = "<position> <tag>" of the last entry of all that an eviction took;
--     "#b", there once books are
--   2 books, a hash, from the first append: "s" .. position = "<attempt> <position of its end, or 0>" of a stream;
--     "p" .. id = a pending server request; "w" .. writer = "<last append ms> <stream> <sequence>:<first> ...",
--     newest first; "#p" = when forgotten writers are to be looked for next
--   3 log, a stream, from the first event: ids are 0-<position>; t = tag, s = stream, d = data
-- All three expire at the same instant, which is "#x": no key is ever without an expiry.
--
-- Only commands and forms that Redis 6.2 has. Script arguments are strings: tonumber() before comparing.

local record, books, log = KEYS[1], KEYS[2], KEYS[3]

-- Every refusal goes through here. A replica may lag behind, and what it lacks may well be there: it must not end what
-- lives. A write that never changes anything makes it answer READONLY instead.
local function refuse(with)
  redis.call('HDEL', record, '#')
  return with
end

-- "gone", and with it the mark of this server's history, which says whether it can know: redis/proof.py. On a Cluster the
-- marks have slots of their own, and the client asks for one.
local function gone()
  return refuse({'gone', ALONE and redis.call('GET', string.match(record, '^(.-):{') .. ':mark') or ''})
end

local function clock()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Lifetime and expiry in ms.
local function span(text)
  local lifetime, expires = string.match(text, '^(%d+) (%d+)$')
  return tonumber(lifetime), tonumber(expires)
end

-- Expiry alone, as text.
local function expires_of(text)
  return string.match(text, ' (%d+)$')
end

-- Position, size, count and tag of the log's head.
local function head(text)
  if not text then return 0, 0, 0, '' end
  local position, size, count, tag = string.match(text, '^(%d+) (%d+) (%d+) (.*)$')
  return position + 0, size + 0, count + 0, tag
end

local function set_head(position, size, count, tag)
  redis.call('HSET', record, '#h', string.format('%d %d %d ', position, size, count) .. tag)
end

-- An eviction took the books and left the record: what is open, pending, or was written by whom is not known any more.
-- So all of the log counts as lost. A position is left out, so that nobody is up to date; what comes goes on after it.
local function lose_log(position)
  redis.call('DEL', log)
  redis.call('HDEL', record, '#b')
  redis.call('HSET', record, '#d', string.format('%d ', position + 1))
  set_head(position + 1, 0, 0, '')
  return position + 1, 0, 0, ''
end

-- Renews the session's place in the sets that the limits are counted by. Their keys are computed here and lie in other
-- slots: on a Cluster the prefix is empty, and the client sends these writes after the script (group.lua). They may come
-- late or be lost: a score only ever lags behind, until the next renewal.
local function index(prefix, member, groups, lifetime, expires)
  if prefix == '' then return end
  for group in string.gmatch(groups or '', '[^\n]+') do
    local key = prefix .. ':g:' .. group
    redis.call('ZADD', key, expires, member)
    if redis.call('PTTL', key) < lifetime then redis.call('PEXPIREAT', key, expires) end
  end
end

-- What is repeated may have been written over another connection, or not have reached a replica. A write, of what is there
-- anyway, gives WAIT something to wait for, and has a replica say that it is one.
local function written_again(text)
  redis.call('PEXPIREAT', record, expires_of(text))
end

local function renew(prefix, member, groups, lifetime, now)
  local expires = now + lifetime
  redis.call('HSET', record, '#x', string.format('%d %d', lifetime, expires))
  redis.call('PEXPIREAT', record, expires)
  redis.call('PEXPIREAT', books, expires)
  redis.call('PEXPIREAT', log, expires)
  index(prefix, member, groups, lifetime, expires)
end

-- Forgets the writers that have been idle for long enough and whose stream is not kept.
local function forget_writers(now)
  local all = redis.call('HGETALL', books)
  local kept, idle = {}, {}
  for i = 1, #all, 2 do
    if string.sub(all[i], 1, 1) == 's' then kept[string.sub(all[i], 2)] = true end
  end
  for i = 1, #all, 2 do
    if string.sub(all[i], 1, 1) == 'w' then
      local used, stream = string.match(all[i + 1], '^(%d+) (%d+) ')
      if now - tonumber(used) >= WRITER_MS and not kept[stream] then idle[#idle + 1] = all[i] end
    end
  end
  for i = 1, #idle do redis.call('HDEL', books, idle[i]) end
  redis.call('HSET', books, '#p', now + WRITER_MS)
end
