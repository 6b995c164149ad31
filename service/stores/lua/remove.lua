-- Removes what is named from a tenant's memories, in a new epoch.
--
-- KEYS  1 configuration (hash), 2 log, 3 epochs (counter), 4 shots' classes, 5 shots' features, 6 shots' images,
--       7 offsets, then keys of the bank to remove
-- ARGV  1 epoch that the caller has, 2 what to remove of the shots: 'ids', 'classes', 'all' or 'none', then the ids
-- Gives {epoch, version, shots removed, mark}; {-1} if the epoch is over, and nothing was written.
-- Removing shots by id that are not there is no change, and starts no epoch. With all shots the offsets go.
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then
  return {-1}
end

local function drop(id)
  if redis.call('HDEL', KEYS[4], id) == 0 then
    return 0
  end
  redis.call('HDEL', KEYS[5], id)
  redis.call('HDEL', KEYS[6], id)
  return 1
end

local removed = 0
if ARGV[2] == 'all' then
  removed = redis.call('HLEN', KEYS[4])
  redis.call('UNLINK', KEYS[4], KEYS[5], KEYS[6], KEYS[7])
  redis.call('HDEL', KEYS[1], 'frame', 'training')
elseif ARGV[2] == 'ids' then
  for at = 3, #ARGV do
    removed = removed + drop(ARGV[at])
  end
  if removed == 0 then
    local known = redis.call('HMGET', KEYS[1], 'version', 'mark')
    return {tonumber(ARGV[1]), tonumber(known[1]), 0, known[2]}
  end
elseif ARGV[2] == 'classes' then
  local named = {}
  for at = 3, #ARGV do
    named[ARGV[at]] = true
  end
  local shots = redis.call('HGETALL', KEYS[4])
  for at = 1, #shots, 2 do
    if named[string.match(shots[at + 1], '^[^ ]+')] then
      removed = removed + drop(shots[at])
    end
  end
end
for at = 8, #KEYS do
  redis.call('UNLINK', KEYS[at])
end
-- Of this change and no other: a replica that takes over counts on from where it was, and with other changes.
local now = redis.call('TIME')
local mark = string.format('%06x', (now[1] * 1000000 + now[2]) % 16777216)
local epoch = redis.call('INCR', KEYS[3])
local version = redis.call('HINCRBY', KEYS[1], 'version', 1)
redis.call('HSET', KEYS[1], 'epoch', epoch, 'settled', version, 'mark', mark, 'base', mark)
redis.call('DEL', KEYS[2])
return {epoch, version, removed, mark}
