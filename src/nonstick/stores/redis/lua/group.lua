-- One group's set, on a Cluster: KEYS is the set alone. ARGV: member, lifetime ms, and the limit, or "" for a member that
-- is in already. Answers whether there was room.
local key, member, lifetime, limit = KEYS[1], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local now = clock()
local score = tonumber(redis.call('ZSCORE', key, member) or 0)
if limit and score < now and redis.call('ZCOUNT', key, now, '+inf') >= limit then return 0 end
redis.call('ZADD', key, string.format('%d', math.max(score, now + lifetime)), member)
if redis.call('PTTL', key) < lifetime then redis.call('PEXPIREAT', key, now + lifetime) end
redis.call('ZREMRANGEBYSCORE', key, '-inf', '(' .. now)
return 1
