-- Writes down how a job stands, unless it is over already: it may have been cancelled meanwhile.
--
-- KEYS  1 configuration (hash), 2 jobs (hash)
-- ARGV  1 id, 2 how it stands (JSON)
-- Gives the number of jobs that are written down; 0 if the tenant is gone or the job is over: nothing is written.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return 0
end
local known = redis.call('HGET', KEYS[2], ARGV[1])
local state = known and cjson.decode(known).state
if known and state ~= 'queued' and state ~= 'running' then
  return 0
end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
return redis.call('HLEN', KEYS[2])
