-- Hashes the dynamic slots of some classes, for a worker to compare its copy with.
--
-- KEYS  1 configuration (hash), then the entropies (sorted set) of each class
-- ARGV  1 epoch and 2 version that the caller has
-- Gives {} if the tenant is not there; else for each class the SHA-1 of its slots in the order of (entropy, id), each
--       as its entropy (nats, big-endian double) and its id
local known = redis.call('HMGET', KEYS[1], 'epoch', 'version')
if known[1] ~= ARGV[1] or known[2] ~= ARGV[2] then
  return {}
end
local out = {}
for at = 2, #KEYS do
  local parts = {}
  local held = redis.call('ZRANGE', KEYS[at], 0, -1, 'WITHSCORES')
  for i = 1, #held, 2 do
    parts[#parts + 1] = struct.pack('>d', tonumber(held[i + 1])) .. held[i]
  end
  out[#out + 1] = redis.sha1hex(table.concat(parts))
end
return out
