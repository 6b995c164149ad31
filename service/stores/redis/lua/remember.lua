-- Keeps an answer for an idempotency key; answers whose time is over, and then the oldest, make room for it.
--
-- KEYS  1 bodies and 2 heads (hashes by key), 3 when each ends (sorted set, key -> seconds), 4 bytes held (counter)
-- ARGV  1 now and 2 end of the answer's time (seconds of one clock), 3 bytes of bodies that may be held, 4 key, 5 head,
--       6 body
local function drop(key)
  local held = redis.call('HSTRLEN', KEYS[1], key)
  redis.call('HDEL', KEYS[1], key)
  redis.call('HDEL', KEYS[2], key)
  redis.call('ZREM', KEYS[3], key)
  redis.call('DECRBY', KEYS[4], held)
end
for _, key in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', ARGV[1])) do
  drop(key)
end
drop(ARGV[4])
redis.call('HSET', KEYS[1], ARGV[4], ARGV[6])
redis.call('HSET', KEYS[2], ARGV[4], ARGV[5])
redis.call('ZADD', KEYS[3], ARGV[2], ARGV[4])
local total = redis.call('INCRBY', KEYS[4], #ARGV[6])
while total > tonumber(ARGV[3]) do
  drop(redis.call('ZRANGE', KEYS[3], 0, 0)[1])
  total = tonumber(redis.call('GET', KEYS[4]))
end
return 1
