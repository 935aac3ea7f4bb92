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
for i, id in ipairs(asked) do
  local token, holder = ARGV[2 * i], holders[i]
  local ours = holder
    and not seen[id]
    and string.find(holder, token, 1, true) == 1
    and string.byte(holder, #token + 1) == 32
  if ours then
    seen[id] = true
    ids[#ids + 1] = id
    local tenant = string.match(holder, '^(%S+) ', #token + 2)
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
