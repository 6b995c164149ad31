-- Lets leases last longer, or takes them back; those that have ended stay so.
--
-- KEYS  1 leases (sorted set, lease -> its end in microseconds), 2 images at work under them (counter)
-- ARGV  1 milliseconds that they last from now on (0: they are over), then leases, written `<images>:<id>`
-- Gives how many of them there were.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local there = 0
for each = 2, #ARGV do
  local lease = ARGV[each]
  local ends = redis.call('ZSCORE', KEYS[1], lease)
  if ends and ARGV[1] == '0' then
    redis.call('ZREM', KEYS[1], lease)
    redis.call('DECRBY', KEYS[2], string.match(lease, '^%d+'))
    there = there + 1
  elseif ends and tonumber(ends) > now then
    redis.call('ZADD', KEYS[1], string.format('%.0f', now + ARGV[1] * 1000), lease)
    there = there + 1
  end
end
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('DEL', KEYS[2])
elseif there > 0 and ARGV[1] ~= '0' then
  redis.call('PEXPIRE', KEYS[1], ARGV[1])
  redis.call('PEXPIRE', KEYS[2], ARGV[1])
end
return there
