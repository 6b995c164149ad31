-- Removes what is named from a tenant's memories, in a new epoch.
--
-- KEYS  1 configuration (hash), 2 log, 3 epochs (counter), 4 shots' classes, 5 shots' features, 6 shots' images,
--       7 offsets, 8 counters (hash), those of each counter, then keys of the bank to remove
-- ARGV  1 epoch that the caller has, 2 what to remove of the class statistics: 'none', 'all' (a new life begins) or class
--       ids with spaces between them, 3 how many counters there are, 4 what to remove of the shots: 'ids', 'classes',
--       'all' or 'none', then the ids
-- Gives {epoch, version, shots removed, mark}; {-1} if the epoch is over, and nothing was written.
-- Removing shots by id that are not there is no change, and starts no epoch. With all shots the offsets go.
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then
  return {-1}
end
local counters = tonumber(ARGV[3])
if redis.call('HLEN', KEYS[8]) ~= counters then
  return {-1}
end

-- The hash of the shots that there are is the sum of theirs, modulo 2^48.
local shown = tonumber(redis.call('HGET', KEYS[1], 'shown') or '', 16) or 0
local function drop(id)
  if redis.call('HDEL', KEYS[4], id) == 0 then
    return 0
  end
  redis.call('HDEL', KEYS[5], id)
  redis.call('HDEL', KEYS[6], id)
  shown = (shown - tonumber(string.sub(redis.sha1hex(id), 1, 12), 16)) % 281474976710656
  return 1
end

local removed = 0
if ARGV[4] == 'all' then
  shown = 0
  removed = redis.call('HLEN', KEYS[4])
  redis.call('UNLINK', KEYS[4], KEYS[5], KEYS[6], KEYS[7])
  redis.call('HDEL', KEYS[1], 'frame', 'training')
elseif ARGV[4] == 'ids' then
  for at = 5, #ARGV do
    removed = removed + drop(ARGV[at])
  end
  if removed == 0 then
    local known = redis.call('HMGET', KEYS[1], 'version', 'mark')
    return {tonumber(ARGV[1]), tonumber(known[1]), 0, known[2]}
  end
elseif ARGV[4] == 'classes' then
  local named = {}
  for at = 5, #ARGV do
    named[ARGV[at]] = true
  end
  local shots = redis.call('HGETALL', KEYS[4])
  for at = 1, #shots, 2 do
    if named[string.match(shots[at + 1], '^[^ ]+')] then
      removed = removed + drop(shots[at])
    end
  end
end
for at = 9 + counters, #KEYS do
  redis.call('UNLINK', KEYS[at])
end
if ARGV[2] ~= 'none' and ARGV[2] ~= 'all' then
  for class in string.gmatch(ARGV[2], '%S+') do
    for at = 9, 8 + counters do
      redis.call('HDEL', KEYS[at], class)
    end
  end
end
-- Of this change and no other: a replica that takes over counts on from where it was, and with other changes.
local now = redis.call('TIME')
local mark = string.format('%06x', (now[1] * 1000000 + now[2]) % 16777216)
local epoch = redis.call('INCR', KEYS[3])
local version = redis.call('HINCRBY', KEYS[1], 'version', 1)
redis.call('HSET', KEYS[1], 'epoch', epoch, 'settled', version, 'mark', mark, 'base', mark)
if removed > 0 then
  redis.call('HSET', KEYS[1], 'shown', shown == 0 and '' or string.format('%06x%06x', math.floor(shown / 16777216), shown % 16777216))
end
if ARGV[2] == 'all' then
  redis.call('HSET', KEYS[1], 'life', epoch)
end
redis.call('DEL', KEYS[2])
return {epoch, version, removed, mark}
