//! What is told of each contestant.

/// One kind of figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Figure {
    /// Of one stream to the server.
    Throughput1,
    /// Of eight streams to the server.
    Throughput,
    /// Of eight streams from the server.
    Download,
    /// Small messages there and back over many connections.
    Messages,
    /// HTTP requests over connections that stay.
    Requests,
    /// HTTP requests with a connection each.
    Connections,
    /// Of a message there and back.
    AddedP50,
    /// The same.
    AddedP99,
    /// The same.
    AddedP999,
    /// Of eight streams.
    CpuPerGigabyte,
    /// With one request each.
    CpuPerConnection,
}

impl Figure {
    /// All, in the order in which they are shown.
    pub const ALL: [Figure; 11] = [
        Figure::Throughput1,
        Figure::Throughput,
        Figure::Download,
        Figure::Messages,
        Figure::Requests,
        Figure::Connections,
        Figure::AddedP50,
        Figure::AddedP99,
        Figure::AddedP999,
        Figure::CpuPerGigabyte,
        Figure::CpuPerConnection,
    ];

    /// The key in JSON.
    pub fn key(self) -> &'static str {
        match self {
            Figure::Throughput1 => "throughput_1_gbps",
            Figure::Throughput => "throughput_gbps",
            Figure::Download => "download_gbps",
            Figure::Messages => "messages_per_s",
            Figure::Requests => "requests_per_s",
            Figure::Connections => "connections_per_s",
            Figure::AddedP50 => "p50_added_us",
            Figure::AddedP99 => "p99_added_us",
            Figure::AddedP999 => "p999_added_us",
            Figure::CpuPerGigabyte => "cpu_s_per_gb",
            Figure::CpuPerConnection => "cpu_us_per_connection",
        }
    }

    /// Its name and unit above a column.
    pub fn title(self) -> &'static str {
        match self {
            Figure::Throughput1 => "1 stream, Gbit/s",
            Figure::Throughput => "8 streams, Gbit/s",
            Figure::Download => "8 streams back, Gbit/s",
            Figure::Messages => "messages/s",
            Figure::Requests => "requests/s",
            Figure::Connections => "connections/s",
            Figure::AddedP50 => "added p50, µs",
            Figure::AddedP99 => "added p99, µs",
            Figure::AddedP999 => "added p99.9, µs",
            Figure::CpuPerGigabyte => "CPU s/GB",
            Figure::CpuPerConnection => "CPU µs/connection",
        }
    }

    /// Whether it is what is added to the same run with nothing in the middle; otherwise it is a rate.
    pub fn is_added(self) -> bool {
        self >= Figure::AddedP50
    }

    /// Digits behind the point.
    pub fn digits(self) -> usize {
        match self {
            Figure::Throughput1 | Figure::Throughput | Figure::Download => 2,
            Figure::CpuPerGigabyte => 3,
            Figure::AddedP50 | Figure::AddedP99 | Figure::AddedP999 | Figure::CpuPerConnection => 1,
            Figure::Messages | Figure::Requests | Figure::Connections => 0,
        }
    }
}
