-- Removes one dynamic slot and bars its id for as long as its class's bank lasts: an empty feature stays in its place.
--
-- KEYS  1 configuration (hash), 2 log, 3 the class's entropies, 4 the class's features
-- ARGV  1 epoch that the caller has, 2 slot id
-- Gives 1 if the slot was there, 0 if not, -1 if the epoch is over; in the last two cases nothing was written.
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then
  return -1
end
if redis.call('ZREM', KEYS[3], ARGV[2]) == 0 then
  return 0
end
redis.call('HSET', KEYS[4], ARGV[2], '')
-- Of this change and no other: a replica that takes over counts on from where it was, and with other changes.
local now = redis.call('TIME')
local mark = string.format('%06x', (now[1] * 1000000 + now[2]) % 16777216)
redis.call('HSET', KEYS[1], 'settled', redis.call('HINCRBY', KEYS[1], 'version', 1), 'mark', mark, 'base', mark)
redis.call('DEL', KEYS[2])
return 1
