-- Reads the banks of some classes as they are at one moment. Nothing is put together here that the client can put
-- together: it has the time, while the server reads the next classes.
--
-- KEYS  1 configuration (hash), then for each class: its entropies (sorted set), its features (hash)
-- ARGV  1 epoch that the caller has
-- Gives {0} if the epoch is over; else {1, then for each class, in the order of (entropy, id): each id and its entropy
--       (nats, in the digits that stand for this very double), a space between them; a list of the features; and the
--       ids that are barred, a space between them}
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then
  return {0}
end
local at_once = 1000 -- arguments that Lua can hand over

local function features(h, ids)
  if #ids <= at_once then
    return #ids == 0 and {} or redis.call('HMGET', h, unpack(ids))
  end
  local found = {}
  for first = 1, #ids, at_once do
    local part = redis.call('HMGET', h, unpack(ids, first, math.min(#ids, first + at_once - 1)))
    for _, feature in ipairs(part) do
      found[#found + 1] = feature
    end
  end
  return found
end

local function barred(z, h, filled)
  local out = {}
  if redis.call('HLEN', h) > filled then
    for _, id in ipairs(redis.call('HKEYS', h)) do
      if not redis.call('ZSCORE', z, id) then
        out[#out + 1] = id
      end
    end
  end
  return table.concat(out, ' ')
end

local out = {1}
for at = 2, #KEYS, 2 do
  local held, ids = redis.call('ZRANGE', KEYS[at], 0, -1, 'WITHSCORES'), {}
  for i = 1, #held, 2 do
    ids[#ids + 1] = held[i]
  end
  out[#out + 1] = table.concat(held, ' ')
  out[#out + 1] = features(KEYS[at + 1], ids)
  out[#out + 1] = barred(KEYS[at], KEYS[at + 1], #ids)
end
return out
