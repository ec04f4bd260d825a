-- A Wireshark dissector for the TCP option that redirects connections by port (stack/PROTOCOL.md).
--
-- Install: copy this file into the folder that Help > About > Folders calls "Personal Lua Plugins", or
--     tshark -X lua_script:captures/redirect.lua -r FILE -Y redirect
--
-- Filter fields: redirect.redirect, redirect.confirm, redirect.port, ... (`tshark -G fields | grep redirect`).
-- redirect.conversation joins what a client does on a redirect port (X) and on service ports (Y): filter by it to see
-- a redirected connection as one.

local redirect = Proto("redirect", "TCP Port Redirection")
local flow = Proto("redirect_flow", "TCP Port Redirection, conversations")

redirect.prefs.exid = Pref.string("ExID", "0x5244", "The experiment identifier of the deployment (RFC 6994)")

local KIND = 253
local TFO_EXID = 0xf989

local f = redirect.fields
f.kind = ProtoField.uint8("redirect.kind", "Kind")
f.length = ProtoField.uint8("redirect.length", "Length")
f.exid = ProtoField.uint16("redirect.exid", "ExID", base.HEX)
f.flags = ProtoField.uint8("redirect.flags", "Flags", base.HEX)
f.version = ProtoField.uint8("redirect.version", "Version (V)", base.DEC, nil, 0xc0)
f.migrate = ProtoField.bool("redirect.migrate", "Migrate (M)", 8, nil, 0x20)
f.has_address = ProtoField.bool("redirect.has_address", "Address follows (A)", 8, nil, 0x10)
f.has_token = ProtoField.bool("redirect.has_token", "Token follows (T)", 8, nil, 0x08)
f.has_port = ProtoField.bool("redirect.has_port", "Port valid (P)", 8, nil, 0x04)
f.confirm = ProtoField.bool("redirect.confirm", "REDIRECT_CONFIRM (C)", 8, nil, 0x02)
f.redirect = ProtoField.bool("redirect.redirect", "REDIRECT (R)", 8, nil, 0x01)
f.more = ProtoField.uint8("redirect.more", "More flags", base.HEX)
f.has_observed = ProtoField.bool("redirect.has_observed", "Observed follows (O)", 8, nil, 0x08)
f.hops = ProtoField.uint8("redirect.hops", "Redirects followed (Hops)", base.DEC, nil, 0x07)
f.port = ProtoField.uint16("redirect.port", "Port (REDIRECT_OPT)")
f.observed = ProtoField.uint16("redirect.observed", "Client as the server sees it, digest", base.HEX)
f.address4 = ProtoField.ipv4("redirect.address", "Address")
f.address6 = ProtoField.ipv6("redirect.address6", "Address")
f.token = ProtoField.bytes("redirect.token", "Token")
f.token_key = ProtoField.uint8("redirect.token.key", "Key", base.DEC, nil, 0xc0)
f.token_slot = ProtoField.uint8("redirect.token.slot", "Slot, low bits", base.DEC, nil, 0x3f)
f.message = ProtoField.string("redirect.message", "Message")

local e = redirect.experts
local function problem(name, text)
    return ProtoExpert.new("redirect." .. name, text, expert.group.PROTOCOL, expert.severity.WARN)
end
e.length_wrong = problem("length_wrong", "W1: the length is not that of the parts: the option is ignored")
e.version_unknown = problem("version_unknown", "W1: unknown version: the option is ignored")
e.bits_unknown = problem("bits_unknown", "W1: unknown bits are set: the option is ignored")
e.port_missing = problem("port_missing", "W1: P without a port: the option is ignored")
e.port_unexpected = problem("port_unexpected", "A port without P")
e.copy = problem("copy", "W1: a second copy of the option: both are ignored")
e.echo = ProtoExpert.new("redirect.echo",
    "A SYN-ACK with R is an echo by something in the path: not a redirect", expert.group.PROTOCOL, expert.severity.WARN)
e.payload = problem("payload", "C1: R on a SYN with data")

local ff = flow.fields
ff.conversation = ProtoField.string("redirect.conversation", "Conversation")
ff.asked = ProtoField.uint16("redirect.asked", "Port asked (X)")

local get = {}
for name, field in pairs({
    syn = "tcp.flags.syn", ack = "tcp.flags.ack", fin = "tcp.flags.fin", rst = "tcp.flags.reset", len = "tcp.len",
    sport = "tcp.srcport", dport = "tcp.dstport", redirect = "redirect.redirect", confirm = "redirect.confirm",
    port = "redirect.port", has_port = "redirect.has_port",
}) do
    get[name] = { name = field }
end

-- redirect.* exist only once the protocol is registered, so fields are fetched at the end of this file.
local function value(name)
    local info = get[name].field()
    return info and info.value
end

local function exid()
    return tonumber(redirect.prefs.exid) or 0x5244
end

-- What a segment with the option is, in the words of PROTOCOL.md §2.
local function message(o)
    local syn, ack = value("syn"), value("ack")
    if syn and not ack then
        if not o.r then return "confirmation of nothing" end
        if not o.p then return o.c and "opening SYN, will reconnect" or "opening SYN, will hand over" end
        return o.c and "opening SYN of a moved connection" or "reconnecting SYN"
    elseif syn then
        if o.r then return "echo" end
        if not o.c then return "nothing said" end
        return o.p and "redirecting SYN-ACK" or "confirming SYN-ACK"
    elseif value("fin") or value("rst") then
        if o.c and o.p and not o.r then return "close of the old connection" end
    end
    if o.r and o.c and o.p then return "handover" end
    if o.r and o.p then return "redirection of an established connection" end
    if o.c and o.p then return "confirmation of a client's new port" end
    return "nothing known"
end

-- The names of those problems that make a receiver ignore the option, and how long it should be.
local function check(o, length)
    local expected = 8
    if o.has_observed then expected = expected + 2 end
    if o.has_token then expected = expected + 8 end
    if o.has_address then
        -- The length tells the family.
        expected = expected + ((length - expected >= 16) and 16 or 4)
    end
    if o.version ~= 0 then return e.version_unknown, expected end
    if o.unknown then return e.bits_unknown, expected end
    if expected ~= length then return e.length_wrong, expected end
    if o.p and o.port == 0 then return e.port_missing, expected end
    return nil, expected
end

local function label(o)
    local words = {}
    if o.r then words[#words + 1] = "R" end
    if o.c then words[#words + 1] = "C" end
    if o.p then words[#words + 1] = "P=" .. o.port end
    if o.has_observed then words[#words + 1] = "O" end
    if o.has_address then words[#words + 1] = "A" end
    if o.has_token then words[#words + 1] = "T" end
    return table.concat(words, " ")
end

-- How many options of ours a frame has had so far; a frame's options are dissected one after the other.
local copies = { frame = 0, count = 0 }

local function dissect_option(tvb, pinfo, tree)
    local length = tvb:len()
    local subtree = tree:add(redirect, tvb())
    subtree:add(f.kind, tvb(0, 1))
    subtree:add(f.length, tvb(1, 1))
    subtree:add(f.exid, tvb(2, 2))
    if length < 8 then
        subtree:add_proto_expert_info(e.length_wrong)
        return
    end
    local flags, more = tvb(4, 1):uint(), tvb(5, 1):uint()
    local o = {
        r = bit32.btest(flags, 0x01), c = bit32.btest(flags, 0x02), p = bit32.btest(flags, 0x04),
        has_token = bit32.btest(flags, 0x08), has_address = bit32.btest(flags, 0x10),
        has_observed = bit32.btest(more, 0x08),
        version = bit32.rshift(flags, 6), port = tvb(6, 2):uint(),
        unknown = bit32.btest(flags, 0x20) or bit32.btest(more, 0xf0),
    }
    local flag_tree = subtree:add(f.flags, tvb(4, 1))
    for _, field in ipairs({ f.version, f.migrate, f.has_address, f.has_token, f.has_port, f.confirm, f.redirect }) do
        flag_tree:add(field, tvb(4, 1))
    end
    local more_tree = subtree:add(f.more, tvb(5, 1))
    more_tree:add(f.has_observed, tvb(5, 1))
    more_tree:add(f.hops, tvb(5, 1))
    subtree:add(f.port, tvb(6, 2))
    local wrong, expected = check(o, length)
    if wrong then subtree:add_proto_expert_info(wrong) end
    if not o.p and o.port ~= 0 then subtree:add_proto_expert_info(e.port_unexpected) end
    if o.version == 0 and expected == length then
        local at = 8
        if o.has_observed then
            subtree:add(f.observed, tvb(at, 2))
            at = at + 2
        end
        if o.has_address then
            local size = (expected - at - (o.has_token and 8 or 0))
            subtree:add(size == 4 and f.address4 or f.address6, tvb(at, size))
            at = at + size
        end
        if o.has_token then
            local token = subtree:add(f.token, tvb(at, 8))
            token:add(f.token_key, tvb(at, 1))
            token:add(f.token_slot, tvb(at, 1))
        end
    end
    if copies.frame ~= pinfo.number then copies.frame, copies.count = pinfo.number, 0 end
    copies.count = copies.count + 1
    if copies.count > 1 then subtree:add_proto_expert_info(e.copy) end
    if value("syn") and value("ack") and o.r then subtree:add_proto_expert_info(e.echo) end
    if value("syn") and not value("ack") and o.r and (value("len") or 0) > 0 then
        subtree:add_proto_expert_info(e.payload)
    end
    local kind = wrong and "ignored" or message(o)
    subtree:add(f.message, kind):set_generated()
    subtree:append_text(": " .. label(o) .. " (" .. kind .. ")")
    pinfo.cols.info:append(" {" .. label(o) .. "}")
end

local others = nil

function redirect.dissector(tvb, pinfo, tree)
    if tvb:len() >= 4 and tvb(2, 2):uint() == exid() then
        dissect_option(tvb, pinfo, tree)
    elseif others then
        others:call(tvb, pinfo, tree)
    elseif tvb:len() >= 4 and tvb(2, 2):uint() ~= TFO_EXID then
        tree:add(tvb(), "TCP Option - Experimental: ExID " .. tostring(tvb(2, 2)))
    else
        tree:add(tvb(), "TCP Option - Experimental")
    end
    return tvb:len()
end

-- Conversations. A redirecting SYN-ACK says which port the client goes on at; from then on the segments there belong
-- to the connection that was asked for.

local known, moving = {}, {}

local function end_point(address, port)
    local host = tostring(address)
    if host:find(":") then host = "[" .. host .. "]" end
    return host .. ":" .. port
end

local function key(client, client_port, vip, port)
    return end_point(client, client_port) .. ">" .. end_point(vip, port)
end

-- The entry that held at a frame: a port may be used again for another connection.
local function lookup(from, frame)
    local found
    for _, entry in ipairs(known[from] or {}) do
        if entry.frame <= frame then found = entry end
    end
    return found
end

local function learn(from, frame, name, asked)
    known[from] = known[from] or {}
    table.insert(known[from], { frame = frame, name = name, asked = asked })
end

function redirect.init()
    known, moving = {}, {}
    copies = { frame = 0, count = 0 }
end

local function learn_from(pinfo, sport, dport)
    local syn, ack, port = value("syn"), value("ack"), value("port")
    local r, c = value("redirect"), value("confirm")
    if port == nil or not value("has_port") then return end
    if syn and ack and c and not r then
        local asked = key(pinfo.dst, dport, pinfo.src, sport)
        local entry = lookup(asked, pinfo.number) or { name = asked, asked = sport }
        learn(key(pinfo.dst, dport, pinfo.src, port), pinfo.number, entry.name, entry.asked)
        -- Beside a kernel's TCP both are seen: the port asked towards the program, the other towards the network.
        learn(asked, pinfo.number, entry.name, entry.asked)
    elseif not syn and r and not c then
        local entry = lookup(key(pinfo.dst, dport, pinfo.src, sport), pinfo.number)
        if entry then
            moving[tostring(pinfo.dst) .. key(pinfo.src, sport, pinfo.src, port)] = entry
        end
    elseif syn and not ack and r and c then
        local entry = moving[tostring(pinfo.src) .. key(pinfo.dst, port, pinfo.dst, dport)]
        if entry then
            learn(key(pinfo.src, sport, pinfo.dst, dport), pinfo.number, entry.name, entry.asked)
        end
    end
end

function flow.dissector(tvb, pinfo, tree)
    local sport, dport = value("sport"), value("dport")
    if not sport or not dport then return end
    if not pinfo.visited then learn_from(pinfo, sport, dport) end
    local up, down = key(pinfo.src, sport, pinfo.dst, dport), key(pinfo.dst, dport, pinfo.src, sport)
    local entry = lookup(up, pinfo.number) or lookup(down, pinfo.number)
    local opening = value("redirect") ~= nil
    if not entry and not opening then return end
    if not entry then
        -- The port asked is a connection of its own name.
        local from_client = value("syn") and not value("ack")
        entry = { name = from_client and up or down, asked = from_client and dport or sport }
    end
    local subtree = tree:add(flow, tvb(0, 0)):set_generated()
    subtree:append_text(": " .. entry.name)
    subtree:add(ff.conversation, entry.name):set_generated()
    subtree:add(ff.asked, entry.asked):set_generated()
end

local options = DissectorTable.get("tcp.option")
others = options:get_dissector(KIND)
options:add(KIND, redirect)
register_postdissector(flow)
for _, field in pairs(get) do
    field.field = Field.new(field.name)
end
