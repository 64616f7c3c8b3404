-- wrk's part of the benchmark: requests that all differ, and the outcome as one line of JSON.
-- Arguments: the body before the request's id, and the body after it, each as a file.
-- For a single thread.

local ffi = require("ffi")
ffi.cdef([[
  typedef struct { long seconds; long microseconds; } clock_time;
  int gettimeofday(clock_time *now, void *timezone);
]])
local now = ffi.new("clock_time")

local the_thread

function setup(thread)
  the_thread = thread
end

local function read(path)
  local file = assert(io.open(path, "rb"))
  local text = file:read("*a")
  file:close()
  return text
end

function init(args)
  before_id, after_id = read(args[1]), read(args[2])
  sent = 0
  answers = {}
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/json"
end

function request()
  sent = sent + 1
  return wrk.format(nil, nil, nil, before_id .. sent .. after_id)
end

-- Counts whole answers by the tenth of a second, since 1970, in which they ended.
function response(status)
  if status == 200 then
    ffi.C.gettimeofday(now, nil)
    local tenth = tonumber(now.seconds) * 10 + math.floor(tonumber(now.microseconds) / 100000)
    local key = string.format("%d", tenth)
    answers[key] = (answers[key] or 0) + 1
  end
end

function done(summary, latency, requests)
  local counts = {}
  for tenth, count in pairs(the_thread:get("answers")) do
    table.insert(counts, string.format('"%s":%d', tenth, count))
  end
  local errors = summary.errors
  print(string.format(
    '{"answers_by_tenth":{%s},"requests":%d,"status_errors":%d,"socket_errors":%d,' ..
    '"timeouts":%d,"latency_p50_us":%d,"latency_p99_us":%d}',
    table.concat(counts, ","), summary.requests, errors.status,
    errors.connect + errors.read + errors.write, errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end
