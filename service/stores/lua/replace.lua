-- Creates a tenant, or replaces its configuration and, with it, the bank that its slots are read from.
--
-- KEYS  1 configuration (hash), 2 log, 3 tombstones, 4 shots' classes (hash, shot id -> class id), 5 shots' features,
--       6 shots' images
-- ARGV  1 and 2 epoch and version that the tenant has to be at ('' if it must not be there), 3 new epoch, 4 bank,
--       5 format, 6 name, 7 configuration (JSON), 8 fingerprint, 9 slots a class, then ids of classes that leave
-- Gives the new version, or -1 if the tenant is not where it was expected; then nothing was written.
local known = redis.call('HMGET', KEYS[1], 'epoch', 'version')
if (known[1] or '') ~= ARGV[1] or (known[2] or '') ~= ARGV[2] then
  return -1
end
local leaves = {}
for at = 10, #ARGV do
  leaves[ARGV[at]] = true
end
if #ARGV >= 10 then
  local shots = redis.call('HGETALL', KEYS[4])
  for at = 1, #shots, 2 do
    if leaves[shots[at + 1]] then
      redis.call('HDEL', KEYS[4], shots[at])
      redis.call('HDEL', KEYS[5], shots[at])
      redis.call('HDEL', KEYS[6], shots[at])
    end
  end
end
local version = known[2] and tonumber(known[2]) + 1 or 0
local text = string.format('%.0f', version)
redis.call('HSET', KEYS[1], 'epoch', ARGV[3], 'bank', ARGV[4], 'version', text, 'settled', text, 'format', ARGV[5],
  'name', ARGV[6], 'config', ARGV[7], 'fingerprint', ARGV[8], 'slots', ARGV[9])
redis.call('DEL', KEYS[2], KEYS[3])
return version
