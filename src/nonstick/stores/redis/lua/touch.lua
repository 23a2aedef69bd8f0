-- ARGV: prefix, member. Answers the lifetime and the groups.
local known = redis.call('HMGET', record, '#x', '#g')
if not known[1] then return gone() end
local lifetime = span(known[1])
renew(ARGV[1], ARGV[2], known[2], lifetime, clock())
return {lifetime, known[2] or ''}
