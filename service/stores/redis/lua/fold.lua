-- Puts a counter that holds the sum of others in their place.
--
-- KEYS  1 configuration (hash), 2 counters (hash), 3 the sum (hash, written before), then those of the others
-- ARGV  1 epoch that the caller has, 2 name of the sum, 3 now (wall time in seconds), then names of the others and the
--       numbers of their latest writes
-- Gives 1; 0 if one of them has counted on, -1 if the epoch is over: then nothing was changed.
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then
  return -1
end
for at = 4, #ARGV, 2 do
  if string.match(redis.call('HGET', KEYS[2], ARGV[at]) or '', '^%d+') ~= ARGV[at + 1] then
    return 0
  end
end
for at = 4, #ARGV, 2 do
  redis.call('HDEL', KEYS[2], ARGV[at])
end
for at = 4, #KEYS do
  redis.call('UNLINK', KEYS[at])
end
redis.call('HSET', KEYS[2], ARGV[2], '1 ' .. ARGV[3])
redis.call('PERSIST', KEYS[3])
return 1
