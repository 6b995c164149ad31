-- Lets images of a tenant in, or says why not: from a token bucket, and beside those that are at work.
--
-- KEYS  1 bucket (hash: tokens, at), 2 leases (sorted set, lease -> its end), 3 images at work under them (counter)
-- ARGV  1 images that want in, 2 tokens that come back a second (0: no limit), 3 tokens that the bucket holds, 4 images
--       that may be at work at a time (0: no limit), 5 lease that they want, 6 milliseconds that it lasts, then leases
--       that are over
-- Gives {microseconds until there are tokens enough, 1 if there is no room beside those at work, tokens left, images at
-- work}; with two zeros first they are in, otherwise nothing was spent. A lease is written `<images>:<id>`.
-- Times are this server's, in microseconds. A bucket that is full is not kept, and a lease that is not renewed ends.
local images, rate, burst, most = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local function size(lease)
  return tonumber(string.match(lease, '^%d+'))
end

local tokens, at = burst, now
if rate > 0 then
  local known = redis.call('HMGET', KEYS[1], 'tokens', 'at')
  if known[1] then
    at = tonumber(known[2])
    -- A clock that was set back brings no tokens.
    tokens = math.min(burst, tonumber(known[1]) + math.max(0, now - at) * rate / 1000000)
  end
end

local held = 0
if most > 0 then
  local ended = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now)
  for each = 7, #ARGV do
    ended[#ended + 1] = ARGV[each]
  end
  for _, lease in ipairs(ended) do
    if redis.call('ZREM', KEYS[2], lease) == 1 then
      redis.call('DECRBY', KEYS[3], size(lease))
    end
  end
  if redis.call('EXISTS', KEYS[2]) == 0 then
    redis.call('DEL', KEYS[3])
  end
  held = tonumber(redis.call('GET', KEYS[3]) or '0')
  if redis.call('ZSCORE', KEYS[2], ARGV[5]) then
    return {0, 0, string.format('%.17g', tokens), held}  -- the caller did not hear it the first time
  end
end

local wait, crowded = 0, 0
-- What rounding takes must not make a caller wait who came when it was told to.
if rate > 0 and images - tokens > 1e-3 then
  wait = math.ceil((images - tokens) * 1000000 / rate)
end
if most > 0 and held + size(ARGV[5]) > most then
  crowded = 1
end
local enters = wait == 0 and crowded == 0
if enters and most > 0 then
  redis.call('ZADD', KEYS[2], string.format('%.0f', now + ARGV[6] * 1000), ARGV[5])
  held = redis.call('INCRBY', KEYS[3], size(ARGV[5]))
  redis.call('PEXPIRE', KEYS[2], ARGV[6])
  redis.call('PEXPIRE', KEYS[3], ARGV[6])
end
if rate > 0 and (enters or now < at) then
  tokens = enters and tokens - images or tokens
  redis.call('HSET', KEYS[1], 'tokens', string.format('%.17g', tokens), 'at', string.format('%.0f', now))
  redis.call('PEXPIRE', KEYS[1], string.format('%.0f', math.ceil((burst - tokens) * 1000 / rate) + 1))
end
return {wait, crowded, string.format('%.17g', tokens), held}
