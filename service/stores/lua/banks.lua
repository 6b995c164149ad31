-- Reads the banks of some classes as they are at one moment.
--
-- KEYS  1 configuration (hash), then for each class: its entropies (sorted set), its features (hash)
-- ARGV  1 epoch that the caller has
-- Gives {0} if the epoch is over; else {1, then for each class {ids and entropies in turn}, {ids and features in turn}}
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then
  return {0}
end
local out = {1}
for at = 2, #KEYS, 2 do
  out[#out + 1] = redis.call('ZRANGE', KEYS[at], 0, -1, 'WITHSCORES')
  out[#out + 1] = redis.call('HGETALL', KEYS[at + 1])
end
return out
