-- ARGV: prefix, member, channel.
local known = redis.call('HMGET', record, '#x', '#g')
redis.call('DEL', record, books, log)
if not known[1] then return 0 end
-- On a Cluster a command of its own: see index() in shared.lua.
for group in string.gmatch(known[2] or '', '[^\n]+') do redis.call('ZREM', ARGV[1] .. ':g:' .. group, ARGV[2]) end
redis.call('PUBLISH', ARGV[3], 'gone')
return 1
