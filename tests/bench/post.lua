-- wrk: post the files of a list, one after the other, raw or as multipart; at the end one line of JSON.
-- Arguments after `--`: the file that lists the images, `raw` or `multipart`, how many of the list to skip at first, and
-- how many tenants, t0 and so on, they are for in turn; 0 for the default one.

local requests, at, BOUNDARY = {}, 0, "----bench-7d1f3c"

local function read(path)
  local file = assert(io.open(path, "rb"))
  local data = file:read("*a")
  file:close()
  return data
end

local function multipart(data)
  return "--" .. BOUNDARY .. "\r\nContent-Disposition: form-data; name=\"images\"; filename=\"a.jpg\"\r\n"
    .. "Content-Type: image/jpeg\r\n\r\n" .. data .. "\r\n--" .. BOUNDARY .. "--\r\n"
end

function init(args)
  at = tonumber(args[3])
  local form = args[2] == "multipart"
  local kind = form and "multipart/form-data; boundary=" .. BOUNDARY or "image/jpeg"
  local tenants = tonumber(args[4])
  for path in io.lines(args[1]) do
    local data, tenant = read(path), tenants > 0 and "t" .. #requests % tenants or nil
    local headers = { ["Content-Type"] = kind, ["X-Tenant"] = tenant }
    requests[#requests + 1] = wrk.format("POST", nil, headers, form and multipart(data) or data)
  end
end

function request()
  at = at % #requests + 1
  return requests[at]
end

function done(summary, latency, _)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format(
    '{"requests": %d, "seconds": %.6f, "failed": %d, "p50_ms": %.4f, "p99_ms": %.4f}\n',
    summary.requests, summary.duration / 1e6, failed, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3
  ))
end
