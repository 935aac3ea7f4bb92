#!lua flags=allow-oom
-- Registers leases again after Redis lost its data. A job that waits although it was leased (the ledger put
-- it back meanwhile, or a restart lost the claim) is taken over: nobody else has it.
--
-- KEYS[1]  the partition
-- ARGV[1]  now_ms, or '' for Redis' clock
-- ARGV[2]  lease, ms
-- ARGV[3]  a random name for this life of the data, if it has none yet
-- ARGV[4…] 6 per job: id, token, priority, tenant, body of the record, and of the first line what is counted, or ''
-- Returns  one number per job: 2 registered again, 0 lost
-- Complexity: O(jobs * log(leased)); the caller sends at most 500 jobs
--@ partition.lua
--@ policies.lua
local now = clock(ARGV[1])
local expiry = now + tonumber(ARGV[2])
begin_epoch(ARGV[3])
local answers = {}
for i = 4, #ARGV, 6 do
  local id, token = ARGV[i], ARGV[i + 1]
  local text = redis.call('HGET', JOBS, id)
  local seq, priority, since, tenant, body, charged = read(text)
  local answer = 0
  if seq and seq ~= '0' and redis.call('HEXISTS', HOLDERS, id) == 0 then
    add('w' .. priority, -1)
    add('z', 1)
    add_tenant(tenant, -1)
    answer = 2
  elseif not text then
    priority, since, tenant, body, charged = ARGV[i + 2], whole(now), ARGV[i + 3], ARGV[i + 4], ARGV[i + 5]
    answer = 2
  end
  if answer == 2 then
    -- The lease counts, even if that is one too many: the job runs.
    local counts = policies >= 2 and redis.call('HEXISTS', policy_key(tenant), 'conc') == 1
    if counts then redis.call('HINCRBY', policy_key(tenant), 'n', 1) end
    redis.call('HSET', JOBS, id, record(0, priority, since, tenant, body, charged))
    redis.call('HSET', HOLDERS, id, holder_of(token, counts and tenant or '', ''))
    redis.call('ZADD', LEASES, expiry, id)
  end
  answers[#answers + 1] = answer
end
save()
return answers
