-- Creates a tenant, or replaces its configuration and, with it, the bank, pile and frame that are read.
--
-- KEYS  1 configuration (hash), 2 log, the present pile: 3 shots' classes (hash, shot id -> class id and size of the
--       image), 4 features, 5 images; 6 the present offsets (hash by class id); then keys of the present bank that leave
-- ARGV  1 and 2 epoch and version that the caller has seen ('' if there must be no tenant), 3 whether slots that were
--       written since matter (1 or 0), 4 new epoch, 5 bank and 6 pile that are to be read, 7 format,
--       8 name, 9 configuration (JSON), 10 fingerprint, 11 origin (JSON), 12 labelling version of the slots, 13 slots a
--       class, 14 now (wall time in seconds), 15 frame that is to be read (0 for none), 16 what is known of its training
--       (JSON), 17 life of the class statistics that is to be read, 18 hash of the shots of a new pile ('-' where the
--       pile stays), then ids of classes that leave
-- Gives {new version, mark}, or {-1} if the tenant has changed since; then nothing was written.
-- A pile that is kept under another fingerprint keeps the shots that have an image, without their features.
local known = redis.call('HMGET', KEYS[1], 'epoch', 'version', 'fingerprint', 'bank', 'pile', 'settled', 'frame', 'format')
if (known[1] or '') ~= ARGV[1] then
  return {-1}
end
local latest = ARGV[3] == '1' and known[2] or known[6]
if latest and tonumber(latest) > tonumber(ARGV[2]) then
  return {-1}
end

-- The hash of the shots that there are is the sum of theirs, modulo 2^48.
local shown = tonumber(redis.call('HGET', KEYS[1], 'shown') or '', 16) or 0
local function weight(id)
  return tonumber(string.sub(redis.sha1hex(id), 1, 12), 16)
end
if known[5] == ARGV[6] and known[8] ~= ARGV[7] then
  -- Releases that know no more than the format that the tenant had may keep no such hash.
  shown = 0
  for _, id in ipairs(redis.call('HKEYS', KEYS[3])) do
    shown = (shown + weight(id)) % 281474976710656
  end
end
local function thin(leaves, blank)
  local shots = redis.call('HGETALL', KEYS[3])
  for at = 1, #shots, 2 do
    local id = shots[at]
    if leaves[string.match(shots[at + 1], '^[^ ]+')] or (blank and redis.call('HEXISTS', KEYS[5], id) == 0) then
      redis.call('HDEL', KEYS[3], id)
      redis.call('HDEL', KEYS[4], id)
      redis.call('HDEL', KEYS[5], id)
      shown = (shown - weight(id)) % 281474976710656
    end
  end
  if blank then
    redis.call('UNLINK', KEYS[4])
  end
end

if known[5] == ARGV[6] then
  local leaves = {}
  for at = 19, #ARGV do
    leaves[ARGV[at]] = true
  end
  local blank = known[3] ~= ARGV[10]
  if blank or #ARGV > 18 then
    thin(leaves, blank)
  end
end
if known[4] == ARGV[5] then
  for at = 7, #KEYS do
    redis.call('UNLINK', KEYS[at])
  end
end
if known[7] == ARGV[15] then
  for at = 19, #ARGV do
    redis.call('HDEL', KEYS[6], ARGV[at])
  end
end
if ARGV[18] ~= '-' then
  shown = tonumber(ARGV[18], 16) or 0
end
-- Of this change and no other: a replica that takes over counts on from where it was, and with other changes.
local now = redis.call('TIME')
local mark = string.format('%06x', (now[1] * 1000000 + now[2]) % 16777216)
local version = string.format('%.0f', known[2] and tonumber(known[2]) + 1 or 0)
redis.call('HSET', KEYS[1], 'epoch', ARGV[4], 'bank', ARGV[5], 'pile', ARGV[6], 'version', version,
  'settled', version, 'mark', mark, 'base', mark,
  'format', ARGV[7], 'name', ARGV[8], 'config', ARGV[9], 'fingerprint', ARGV[10], 'origin', ARGV[11],
  'labelling', ARGV[12], 'slots', ARGV[13], 'life', ARGV[17],
  'shown', shown == 0 and '' or string.format('%06x%06x', math.floor(shown / 16777216), shown % 16777216))
redis.call('HSETNX', KEYS[1], 'created', ARGV[14])
if ARGV[15] == '0' then
  redis.call('HDEL', KEYS[1], 'frame', 'training')
else
  redis.call('HSET', KEYS[1], 'frame', ARGV[15], 'training', ARGV[16])
end
redis.call('DEL', KEYS[2])
return {tonumber(version), mark}
