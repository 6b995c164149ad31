-- Lets candidates into a tenant's dynamic memory by Eq. (5), and returns every slot change since a version.
-- Without candidates it is a sync.
--
-- KEYS  1 configuration (hash), 2 log (stream), then for each class named: its entropies (sorted set, slot id -> nats),
--       its features (hash, slot id -> bytes)
-- ARGV  1 epoch, version and mark that the caller has, a space between them, then for each candidate: number of its
--       class (from 1), slot id, entropy (nats, a little-endian double) and feature (bytes) in one
-- Gives {0} if the caller has to load anew, and nothing was written; else {1, version, verdicts, changes, mark}:
--       verdicts are {outcome, evicted id or ''}, changes are {class id, slot id, entropy, feature, evicted id or ''}
--
-- One call is one atomic step. Sorted sets order equal entropies by id, so the last member is the largest (entropy,
-- id) of its class: the result does not depend on the order of calls, and a call that is repeated changes nothing.
local known = redis.call('HMGET', KEYS[1], 'epoch', 'version', 'settled', 'slots', 'mark', 'base')
local epoch, seen, witness = string.match(ARGV[1], '(%d+) (%d+) (%S*)')
local since = tonumber(seen)
if known[1] ~= epoch or since < tonumber(known[3]) then
  return {0}
end
local version, slots, mark = tonumber(known[2]), tonumber(known[4]), known[5] or ''

-- The caller may have seen writes that were lost with a primary that had not passed them on: what it has last seen has
-- to be of this history, and not only of the same number.
local function was(at)
  if at == version then
    return mark
  elseif at == tonumber(known[3]) then
    return known[6] or ''
  end
  local id = string.format('%.0f-0', at)
  local entry = redis.call('XRANGE', KEYS[2], id, id)[1]
  return entry and entry[2][12]
end
if since > version or was(since) ~= witness then
  return {0}
end
local log_length = 2048 -- slot changes kept for workers that are behind; one further behind loads anew

local changes = {}
if version > since then
  local missed = redis.call('XRANGE', KEYS[2], string.format('%.0f-0', since + 1), '+')
  if #missed ~= version - since then
    return {0}
  end
  for i, entry in ipairs(missed) do
    local values = entry[2]
    changes[i] = {values[2], values[4], values[6], values[8], values[10]}
  end
end

-- Of this change and no other: a replica that takes over counts on from where it was, and with other changes.
local now = redis.call('TIME')
local next_mark = string.format('%06x', (now[1] * 1000000 + now[2]) % 16777216)

-- Lua's own < compares by the server's locale; ours has to be the same everywhere.
local function less(a, b)
  for at = 1, math.min(#a, #b) do
    local left, right = string.byte(a, at), string.byte(b, at)
    if left ~= right then
      return left < right
    end
  end
  return #a < #b
end

local function write(z, h, id, entropy, feature, evicted)
  if evicted ~= '' then
    redis.call('ZREM', z, evicted)
    redis.call('HDEL', h, evicted)
  end
  redis.call('ZADD', z, entropy, id)
  redis.call('HSET', h, id, feature)
  version = version + 1
  local class = string.match(z, '[^:]+$')
  redis.call('XADD', KEYS[2], 'MAXLEN', '=', log_length, string.format('%.0f-0', version),
    'c', class, 'i', id, 'e', entropy, 'f', feature, 'o', evicted, 'm', next_mark)
  changes[#changes + 1] = {class, id, entropy, feature, evicted}
end

local function enter(z, h, id, entropy, feature)
  local held = redis.call('ZSCORE', z, id)
  if held then
    local old, new = tonumber(held), tonumber(entropy)
    if new < old or (new == old and less(feature, redis.call('HGET', h, id))) then
      write(z, h, id, entropy, feature, '')
    end
    return {'duplicate', ''}
  end
  if redis.call('HEXISTS', h, id) == 1 then
    return {'rejected', ''}
  end
  if redis.call('ZCARD', z) < slots then
    write(z, h, id, entropy, feature, '')
    return {'filled', ''}
  end
  local worst = redis.call('ZREVRANGE', z, 0, 0, 'WITHSCORES')
  if #worst == 0 then
    return {'rejected', ''}
  end
  local least, new = tonumber(worst[2]), tonumber(entropy)
  if new > least or (new == least and less(worst[1], id)) then
    return {'rejected', ''}
  end
  write(z, h, id, entropy, feature, worst[1])
  return {'replaced', worst[1]}
end

local verdicts = {}
for at = 2, #ARGV, 3 do
  local z = 1 + 2 * tonumber(ARGV[at])
  -- All 17 digits: the text stands for this very double.
  local nats, rest = struct.unpack('<d', ARGV[at + 2])
  local entropy = string.format('%.17g', nats)
  verdicts[#verdicts + 1] = enter(KEYS[z], KEYS[z + 1], ARGV[at + 1], entropy, string.sub(ARGV[at + 2], rest))
end
if version > tonumber(known[2]) then
  mark = next_mark
  redis.call('HSET', KEYS[1], 'version', string.format('%.0f', version), 'mark', mark)
end
return {1, string.format('%.0f', version), verdicts, changes, mark}
