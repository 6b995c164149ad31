-- Removes a tenant with all that it has, but for its counter of epochs; banks, piles, frames and snapshots' parts are left
-- to be swept.
--
-- KEYS  1 configuration (hash), 2 snapshots (hash), 3 API keys (hash), then every other key of the tenant
-- ARGV  formats that the caller knows
-- Gives {-1} if the tenant is of another format, and nothing was removed; else {1 if it was there, else 0, then the
--       ids of its snapshots}. The API keys of a tenant that was not there stay: one of them may be about to make it.
local format = redis.call('HGET', KEYS[1], 'format')
local known = not format
for _, one in ipairs(ARGV) do
  known = known or one == format
end
if not known then
  return {-1}
end
local out = {format and 1 or 0}
for _, id in ipairs(redis.call('HKEYS', KEYS[2])) do
  out[#out + 1] = id
end
redis.call('UNLINK', KEYS[1], KEYS[2], unpack(KEYS, 4))
if format then
  redis.call('UNLINK', KEYS[3])
end
return out
