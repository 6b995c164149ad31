-- Makes a snapshot whose parts were written one by one be there.
--
-- KEYS  1 configuration (hash), 2 snapshots (hash), 3 the snapshot's parts (hash)
-- ARGV  1 id, 2 what is known of it (JSON), 3 number of parts
-- Gives 1; 0 if the tenant is gone or a part is missing, and then nothing is kept.
if redis.call('EXISTS', KEYS[1]) == 0 or redis.call('HLEN', KEYS[3]) ~= tonumber(ARGV[3]) then
  redis.call('UNLINK', KEYS[3])
  return 0
end
redis.call('PERSIST', KEYS[3])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
return 1
