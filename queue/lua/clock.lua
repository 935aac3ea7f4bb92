-- The time by Redis' own clock, in ms. Not a script of its own (see src/scripts.rs). `given` is empty except in tests.
local function clock(given)
  if given ~= '' then return tonumber(given) end
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end
