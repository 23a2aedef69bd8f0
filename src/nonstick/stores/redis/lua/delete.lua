-- ARGV: prefix, member, channel. Answers whether it was live, and its groups.
local known = redis.call('HMGET', record, '#x', '#g')
redis.call('DEL', record, books, log)
if not known[1] then return {0, '', gone()[2]} end
if ARGV[1] ~= '' then  -- else see index() in shared.lua
  for group in string.gmatch(known[2] or '', '[^\n]+') do redis.call('ZREM', ARGV[1] .. ':g:' .. group, ARGV[2]) end
end
redis.call('PUBLISH', ARGV[3], 'gone')
return {1, known[2] or ''}
