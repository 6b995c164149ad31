-- Writes a part of what a counter has counted, and with the last part that it has.
--
-- KEYS  1 configuration (hash), 2 counters (hash, name -> number and wall time of its latest write), 3 the counter's own
--       (hash, class id -> bytes), 4 lives (set)
-- ARGV  1 epoch that the caller has, 2 number of the life, 3 name of the counter, 4 number of its latest write that the
--       caller knows (0: none), 5 whether this is the last part (1 or 0), 6 seconds that a counter may stay unfinished,
--       7 now (wall time in seconds), then class ids and bytes
-- Gives the number of this write; 0 if the counter was folded since, -1 if the epoch is over: then nothing was written.
-- A later write than the caller knows is its own, of which it did not hear: nobody else writes this counter.
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then
  return -1
end
local known = redis.call('HGET', KEYS[2], ARGV[3])
local latest = tonumber(known and string.match(known, '^%d+') or '0')
if latest < tonumber(ARGV[4]) then
  return 0
end
redis.call('SADD', KEYS[4], ARGV[2])
for at = 8, #ARGV, 2 do
  redis.call('HSET', KEYS[3], ARGV[at], ARGV[at + 1])
end
if ARGV[5] == '1' then
  redis.call('HSET', KEYS[2], ARGV[3], string.format('%.0f %s', latest + 1, ARGV[7]))
  redis.call('PERSIST', KEYS[3])
elseif not known then
  -- One whose writer dies goes by itself.
  redis.call('EXPIRE', KEYS[3], ARGV[6])
end
return latest + 1
