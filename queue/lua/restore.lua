#!lua flags=allow-oom
-- Registers leases again after Redis lost its data. A job that waits although it was leased (the ledger put
-- it back meanwhile, or a restart lost the claim) is taken over: nobody else has it.
--
-- KEYS[1]  the partition
-- ARGV[1]  now_ms, or '' for Redis' clock
-- ARGV[2]  lease, ms
-- ARGV[3]  a random name for this life of the data, if it has none yet
-- ARGV[4…] 12 per job: id, token, kind, priority, tenant, run_at_ms or '', enqueued_at_ms, traceparent or '',
--          tracestate or '', fast record or '', charged failures or '', lost leases or ''
-- Returns  one number per job: 2 registered again, 0 lost
-- Complexity: O(jobs * log(leased)); the caller sends at most 500 jobs
--@ partition.lua
local now = clock(ARGV[1])
local expiry = now + tonumber(ARGV[2])
begin_epoch(ARGV[3])
local answers = {}
for i = 4, #ARGV, 12 do
  local id, token = ARGV[i], ARGV[i + 1]
  local key = job_key(id)
  local job = redis.call('HMGET', key, 's', 'p', 't')
  local answer = 0
  if job[1] == 'w' then
    add('w' .. job[2], -1)
    add('z', 1)
    add_tenant(job[3], -1)
    redis.call('HSET', key, 's', 'l', 'x', token)
    answer = 2
  elseif not job[1] then
    local fields = { 'k', ARGV[i + 2], 'p', ARGV[i + 3], 't', ARGV[i + 4], 'e', ARGV[i + 6] }
    for offset, name in pairs({ [5] = 'r', [7] = 'c', [8] = 'd', [9] = 'f', [10] = 'a', [11] = 'n' }) do
      if ARGV[i + offset] ~= '' then
        fields[#fields + 1] = name
        fields[#fields + 1] = ARGV[i + offset]
      end
    end
    redis.call('HSET', key, 's', 'l', 'x', token, 'w', now, unpack(fields))
    answer = 2
  end
  if answer == 2 then redis.call('ZADD', LEASES, expiry, id) end
  answers[#answers + 1] = answer
end
save()
return answers
