-- Adds shots to a tenant's static memory; one whose id is there changes nothing, unless it waits for its feature.
--
-- KEYS  1 configuration (hash), 2 log, 3 shots' classes, 4 shots' features, 5 shots' images
-- ARGV  1 epoch that the caller has, 2 hash of the shots that it has counted, or 'any', then for each shot: id, class id
--       and size of the image, feature (bytes), image (bytes, '' for none)
-- Gives {version, mark}, or {-1} if the epoch is over or other shots are there; then nothing was written.
local known = redis.call('HMGET', KEYS[1], 'epoch', 'shown')
if known[1] ~= ARGV[1] or (ARGV[2] ~= 'any' and (known[2] or '') ~= ARGV[2]) then
  return {-1}
end
-- The hash of the shots that there are is the sum of theirs, modulo 2^48.
local shown = tonumber(known[2] or '', 16) or 0
local new = 0
for at = 3, #ARGV, 4 do
  local id, feature, image = ARGV[at], ARGV[at + 2], ARGV[at + 3]
  if redis.call('HSETNX', KEYS[3], id, ARGV[at + 1]) == 1 then
    redis.call('HSET', KEYS[4], id, feature)
    if image ~= '' then
      redis.call('HSET', KEYS[5], id, image)
    end
    shown = (shown + tonumber(string.sub(redis.sha1hex(id), 1, 12), 16)) % 281474976710656
    new = new + 1
  elseif feature ~= '' and (redis.call('HGET', KEYS[4], id) or '') == '' then
    redis.call('HSET', KEYS[4], id, feature)
    new = new + 1
  end
end
if new == 0 then
  local stands = redis.call('HMGET', KEYS[1], 'version', 'mark')
  return {tonumber(stands[1]), stands[2]}
end
-- Of this change and no other: a replica that takes over counts on from where it was, and with other changes.
local now = redis.call('TIME')
local mark = string.format('%06x', (now[1] * 1000000 + now[2]) % 16777216)
local version = redis.call('HINCRBY', KEYS[1], 'version', 1)
redis.call('HSET', KEYS[1], 'settled', version, 'mark', mark, 'base', mark,
  'shown', shown == 0 and '' or string.format('%06x%06x', math.floor(shown / 16777216), shown % 16777216))
redis.call('DEL', KEYS[2])
return {version, mark}
