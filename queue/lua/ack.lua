#!lua flags=allow-oom
-- Removes finished jobs whose lease is the caller's.
--
-- KEYS[1]  the partition
-- ARGV     2 per job: id, token
-- Returns  one number per job: 1 removed, 0 not ours
-- Complexity: O(jobs * log(leased)); the caller sends at most 500 jobs
local part = KEYS[1]
--@ policies.lua
local asked, seen, ids, answers, counts = {}, {}, {}, {}, {}
for i = 1, #ARGV, 2 do asked[#asked + 1] = ARGV[i] end
local holders = redis.call('HMGET', part .. ':x', unpack(asked))
-- The jobs of one claim have one holder, unless limits count them: what was found out of the last one holds for the next.
local known, known_token, known_ours, tenant
for i, id in ipairs(asked) do
  local token, holder = ARGV[2 * i], holders[i]
  if holder ~= known or token ~= known_token then
    known, known_token = holder, token
    known_ours, tenant = held_by(holder, token)
  end
  local ours = known_ours and not seen[id]
  if ours then
    seen[id] = true
    ids[#ids + 1] = id
    if tenant then counts[tenant] = (counts[tenant] or 0) + 1 end
  end
  answers[i] = ours and 1 or 0
end
if #ids > 0 then
  redis.call('HDEL', part .. ':j', unpack(ids))
  redis.call('HDEL', part .. ':x', unpack(ids))
  redis.call('ZREM', part .. ':l', unpack(ids))
  -- Whoever a limit kept waiting may go on.
  local back = ended(counts)
  local idle = redis.call('HGET', part, 'i')
  if idle == '2' or idle == '1' and back then
    redis.call('HDEL', part, 'i')
    redis.call('PUBLISH', part .. ':wake', 1)
  end
end
return answers
