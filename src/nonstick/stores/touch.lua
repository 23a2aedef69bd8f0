-- ARGV: prefix, member.
local known = redis.call('HMGET', record, '#x', '#g')
if not known[1] then return refuse('gone') end
renew(ARGV[1], ARGV[2], known[2], (span(known[1])), clock())
return 'ok'
