-- Removes a tenant with all that it has, but for its counter of epochs; its banks are left to be swept.
--
-- KEYS  1 configuration (hash), then every other key of the tenant
-- Gives 1 if the tenant was there, else 0.
local there = redis.call('EXISTS', KEYS[1])
redis.call('UNLINK', unpack(KEYS))
return there
