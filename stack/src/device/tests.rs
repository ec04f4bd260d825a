use std::fs::File;
use std::io;
use std::net::UdpSocket;
use std::process::Command;
use std::time::{Duration, SystemTime};

use bytes::BytesMut;
use nix::sched::{CloneFlags, unshare};
use pcap_file::pcapng::PcapNgReader;
use pcap_file::pcapng::blocks::block_common::Block;
use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketOption;
use pcap_file::pcapng::blocks::opt_common::CommonOption;

use super::*;
use crate::wire::{Segment, TcpFlags};

fn segment(port: u16) -> Packet {
    let source = "192.0.2.1:1000".parse().unwrap();
    let destination = std::net::SocketAddr::new("192.0.2.2".parse().unwrap(), port);
    Segment::bare(source, destination, TcpFlags::SYN).emit()
}

async fn received(device: &impl Device) -> Packet {
    let mut buffer = BytesMut::from(&b"old content that must not be seen"[..]);
    let offload = device.recv(&mut buffer).await.unwrap();
    Packet::parse(buffer, offload).unwrap()
}

/// Makes a datagram from port 5000 to port 6000 the answer to itself.
fn turn_back(packet: &mut Packet) {
    let (source, destination) = (packet.source(), packet.destination());
    packet.set_source(destination);
    packet.set_destination(source);
    packet.set_source_port(6000);
    packet.set_destination_port(5000);
}

#[tokio::test]
async fn a_memory_link_carries_packets_both_ways_in_order() {
    let (left, right) = MemoryDevice::pair(1500, 8);
    for port in 1..=3 {
        left.send(&segment(port)).await.unwrap();
    }
    right.send(&segment(9)).await.unwrap();
    for port in 1..=3 {
        assert_eq!(received(&right).await, segment(port));
    }
    assert_eq!(received(&left).await, segment(9));
}

#[tokio::test]
async fn a_full_memory_link_drops_and_counts() {
    let (left, right) = MemoryDevice::pair(1500, 2);
    for port in 1..=5 {
        left.send(&segment(port)).await.unwrap();
    }
    assert_eq!(left.dropped(), 3);
    assert_eq!(received(&right).await, segment(1));
    assert_eq!(received(&right).await, segment(2));
}

#[tokio::test]
async fn a_memory_link_refuses_what_exceeds_its_mtu() {
    let (left, _right) = MemoryDevice::pair(39, 2);
    assert_eq!(left.send(&segment(1)).await.unwrap_err().kind(), io::ErrorKind::InvalidInput);
}

#[tokio::test]
async fn a_memory_link_ends_when_its_other_end_is_dropped() {
    let (left, right) = MemoryDevice::pair(1500, 8);
    left.send(&segment(1)).await.unwrap();
    let waiting = tokio::spawn(async move {
        let _ = received(&right).await;
        right.recv(&mut BytesMut::new()).await.map(drop)
    });
    tokio::task::yield_now().await;
    drop(left);
    assert_eq!(waiting.await.unwrap().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn every_receiver_of_a_memory_link_is_woken() {
    let (left, right) = MemoryDevice::pair(1500, 64);
    let right = Arc::new(right);
    let mut receivers = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let right = Arc::clone(&right);
        receivers.spawn(async move { received(&right).await });
    }
    tokio::task::yield_now().await;
    for port in 1..=8 {
        left.send(&segment(port)).await.unwrap();
    }
    let all = tokio::time::timeout(Duration::from_secs(5), receivers.join_all()).await.unwrap();
    assert_eq!(all.len(), 8);
}

/// (interface name, direction, time, bytes) of each packet of a file.
fn read_capture(path: &std::path::Path) -> Vec<(String, u32, Duration, Vec<u8>)> {
    let mut reader = PcapNgReader::new(File::open(path).unwrap()).unwrap();
    let mut names = Vec::new();
    let mut packets = Vec::new();
    while let Some(block) = reader.next_block() {
        match block.unwrap().0 {
            Block::InterfaceDescription(interface) => {
                assert_eq!(interface.linktype, pcap_file::DataLink::RAW);
                names.push(format!("{:?}", interface.options[0]));
            }
            Block::EnhancedPacket(packet) => {
                let EnhancedPacketOption::Flags(flags) = packet.options[0] else { panic!("no direction") };
                let name = names[packet.interface_id as usize].clone();
                packets.push((name, flags, packet.timestamp, packet.data.to_vec()));
            }
            _ => {}
        }
    }
    packets
}

#[tokio::test]
async fn a_capture_holds_both_directions_with_interface_and_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("both.pcapng");
    let (left, right) = MemoryDevice::pair(1500, 8);
    let capture = Capture::create(&path).unwrap();
    let left = Captured::new(left, &capture);
    let right = Captured::new(right, capture);
    let before = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    left.send(&segment(7)).await.unwrap();
    let _ = received(&right).await;
    drop((left, right));

    let packets = read_capture(&path);
    assert_eq!(packets.len(), 2);
    let (name, flags, time, bytes) = &packets[0];
    assert!(name.contains("memory0"), "{name}");
    assert_eq!((*flags, &bytes[..]), (2, segment(7).bytes()));
    assert!(*time >= before && *time < before + Duration::from_secs(60), "{time:?} is not about {before:?}");
    let (name, flags, _, bytes) = &packets[1];
    assert!(name.contains("memory1"), "{name}");
    assert_eq!((*flags, &bytes[..]), (1, segment(7).bytes()));
}

#[tokio::test]
async fn n6_a_capture_says_what_was_decided_about_a_packet() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("why.pcapng");
    let (left, right) = MemoryDevice::pair(1500, 8);
    let left = std::sync::Arc::new(Captured::new(left, Capture::create(&path).unwrap()));
    left.send_because(&segment(1), || "selected (B1): server web-1".to_owned()).await.unwrap();
    left.send_because(&segment(2), String::new).await.unwrap();
    left.send(&segment(3)).await.unwrap();
    // What is received waits for what is decided, and is not behind what comes after.
    for number in 4..=7 {
        right.send(&segment(number)).await.unwrap();
        let _ = received(&*left).await;
        match number {
            4 => left.dropped(|| "dropped: no redirect port".to_owned()),
            5 => left.send(&segment(5)).await.unwrap(),
            _ => {}
        }
    }
    drop(left);

    let mut reader = PcapNgReader::new(File::open(&path).unwrap()).unwrap();
    let (mut comments, mut packets) = (Vec::new(), Vec::new());
    while let Some(block) = reader.next_block() {
        let Block::EnhancedPacket(packet) = block.unwrap().0 else { continue };
        packets.push(packet.data.to_vec());
        comments.push(packet.options.iter().find_map(|option| match option {
            EnhancedPacketOption::Common(CommonOption::Comment(comment)) => Some(comment.to_string()),
            _ => None,
        }));
    }
    let said = |text: &str| Some(text.to_owned());
    let dropped = said("dropped: no redirect port");
    assert_eq!(comments, [said("selected (B1): server web-1"), None, None, dropped, None, None, None, None]);
    let expected = [1, 2, 3, 4, 5, 5, 6, 7].map(|number| segment(number).bytes().to_vec());
    assert_eq!(packets, expected);
    // Nobody else asks why.
    let (left, _right) = MemoryDevice::pair(1500, 8);
    left.send_because(&segment(1), || panic!("nobody records it")).await.unwrap();
}

#[test]
fn a_capture_reaches_the_disk_within_a_second_although_nothing_follows() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("idle.pcapng");
    let capture = Capture::create(&path).unwrap();
    capture.record(Direction::In, "tun0", segment(1).bytes(), SystemTime::now());
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(read_capture(&path).len(), 1);
    capture.record(Direction::In, "tun0", segment(2).bytes(), SystemTime::now());
    drop(capture);
    assert_eq!(read_capture(&path).len(), 2);
}

#[test]
fn a_full_disk_stops_the_capture_and_nothing_else() {
    let capture = Capture::create("/dev/full");
    assert!(capture.is_err(), "the file's header has nowhere to go");

    let (reader, writer) = nix::unistd::pipe().unwrap();
    let capture =
        Capture::create(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&writer))).unwrap();
    drop((reader, writer));
    capture.record(Direction::In, "tun0", segment(1).bytes(), SystemTime::now());
    std::thread::sleep(Duration::from_millis(1100));
    for port in 2..100 {
        capture.record(Direction::In, "tun0", segment(port).bytes(), SystemTime::now());
    }
    assert_eq!(capture.lost(), 98);
}

/// Runs `test` in a network namespace of its own.
fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let run = move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("this test makes a network namespace: run it as root");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
    };
    std::thread::spawn(run).join().unwrap();
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().expect("this test needs iproute2");
    assert!(status.success(), "ip {arguments}");
}

/// Packets pass both ways between a device named tun7 and the kernel, also those larger than the MTU at its birth.
async fn exchanges_packets_with_the_kernel(device: impl Device) {
    assert_eq!((device.name(), device.mtu()), ("tun7", 1500));
    ip("address add 10.1.2.1/24 dev tun7");
    ip("link set tun7 up mtu 9000");
    assert_eq!(device.mtu(), 9000);
    let socket = UdpSocket::bind("10.1.2.1:5000").unwrap();
    socket.set_nonblocking(true).unwrap();
    for length in [10, 8000, 1400, 8900] {
        socket.send_to(&vec![7; length], "10.1.2.2:6000").unwrap();
        let packet = loop {
            // Router solicitations are packets, too.
            let packet = tokio::time::timeout(Duration::from_secs(5), received(&device)).await.unwrap();
            if packet.version() == crate::wire::Version::V4 {
                break packet;
            }
        };
        assert_eq!((packet.len(), packet.checksum_ok()), (28 + length, true));
        let mut answer = packet;
        turn_back(&mut answer);
        device.send(&answer).await.unwrap();
        let mut buffer = vec![0; 65536];
        assert_eq!(socket.recv_from(&mut buffer).unwrap().0, length);
    }
    ip("link delete tun7");
    assert!(device.recv(&mut BytesMut::new()).await.is_err(), "the device is gone");
}

#[test]
fn a_tun_device_exchanges_packets_of_any_size_with_the_kernel() {
    in_namespace(|| async { exchanges_packets_with_the_kernel(TunDevice::open("tun7").unwrap()).await });
}

/// 50 datagrams of one write are one super-packet where the device has them, and answered by one; else 50.
async fn carries_what_one_write_made(super_packets: bool) {
    use nix::sys::socket::{setsockopt, sockopt::UdpGsoSegment};
    let mut options = TunOptions::new("tun7");
    options.super_packets = super_packets;
    let device = TunDevice::create(options).unwrap();
    ip("address add 10.1.2.1/24 dev tun7");
    let socket = UdpSocket::bind("10.1.2.1:5000").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    setsockopt(&socket, UdpGsoSegment, &1000).unwrap();
    let content: Vec<u8> = (0u32..49_500).map(|at| (at % 251) as u8).collect();
    socket.send_to(&content, "10.1.2.2:6000").unwrap();
    let (mut packets, mut left) = (Vec::new(), content.len());
    while left > 0 {
        let packet = tokio::time::timeout(Duration::from_secs(5), received(&device)).await.unwrap();
        if packet.version() == crate::wire::Version::V4 {
            left -= packet.len() - 28;
            packets.push(packet);
        }
    }
    assert_eq!(packets.len(), if super_packets { 1 } else { 50 });
    for packet in &mut packets {
        assert!(packet.checksum_ok());
        turn_back(packet);
    }
    // Cut by ourselves it is the same to the kernel.
    for cut_here in [false, true] {
        for packet in &packets {
            if cut_here { device.send_segments(packet).await } else { device.send(packet).await }.unwrap();
        }
        let mut buffer = vec![0; 65_536];
        for expected in content.chunks(1000) {
            let length = socket.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], expected);
        }
    }
    assert_eq!((device.truncated(), device.malformed(), device.segmented()), (0, 0, 0));
}

#[test]
fn a_tun_device_carries_super_packets_in_one_piece() {
    in_namespace(|| carries_what_one_write_made(true));
}

#[test]
fn a_tun_device_without_super_packets_carries_their_segments() {
    in_namespace(|| carries_what_one_write_made(false));
}

#[test]
fn what_the_kernel_does_not_take_in_one_piece_is_cut_and_counted() {
    use crate::wire::{Gso, GsoKind};
    in_namespace(|| async {
        let device = TunDevice::open("tun7").unwrap();
        ip("address add 10.1.2.1/24 dev tun7");
        let socket = UdpSocket::bind("10.1.2.1:5000").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket.send_to(&[7; 3000][..1000], "10.1.2.2:6000").unwrap();
        let packet = loop {
            let packet = received(&device).await;
            if packet.version() == crate::wire::Version::V4 {
                break packet;
            }
        };
        let refusal = io::Error::from_raw_os_error(nix::libc::EINVAL);
        let mut answer = packet;
        turn_back(&mut answer);
        let cut_at = |size: u16| {
            let gso = Some(Gso { kind: GsoKind::Udp, size, ecn: false });
            Packet::parse(BytesMut::from(answer.bytes()), Offload { partial_checksum: true, gso }).unwrap()
        };
        let mut buffer = [0; 2000];
        // The kernel keeps this size for itself (GSO_BY_FRAGS).
        device.send(&cut_at(u16::MAX)).await.unwrap();
        assert_eq!((device.segmented(), socket.recv(&mut buffer).unwrap()), (1, 1000));
        device.send_refused(&cut_at(400), &refusal).await.unwrap();
        assert_eq!(device.segmented(), 2);
        for length in [400, 400, 200] {
            assert_eq!(socket.recv(&mut buffer).unwrap(), length);
        }
        // A device that is down takes no segments either, and says so.
        ip("link set tun7 down");
        let error = device.send(&cut_at(400)).await.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::EIO));
        assert_eq!(device.segmented(), 2);
    });
}

#[cfg(feature = "plain-tun")]
#[test]
fn a_plain_tun_device_exchanges_packets_of_any_size_with_the_kernel() {
    in_namespace(|| async {
        // sysfs shows the namespace it was mounted in.
        unshare(CloneFlags::CLONE_NEWNS).expect("this test makes a mount namespace: run it as root");
        assert!(Command::new("mount").args(["--make-rprivate", "/"]).status().unwrap().success());
        assert!(Command::new("mount").args(["-t", "sysfs", "sysfs", "/sys"]).status().unwrap().success());
        exchanges_packets_with_the_kernel(AnyDevice::open(DeviceKind::PlainTun, "tun7").unwrap()).await;
    });
}

#[test]
fn the_error_of_creating_a_device_says_what_to_do() {
    in_namespace(|| async {
        let message = |name: &str| TunDevice::open(name).err().unwrap().to_string();
        let _open = TunDevice::open("tun7").unwrap();
        let taken = message("tun7");
        assert!(taken.contains("tun7") && taken.contains("another process"), "{taken}");
        let other = message("lo");
        assert!(other.contains("no TUN device"), "{other}");
        let long = message("a-name-of-16-byt");
        assert!(long.contains("1 to 15 bytes"), "{long}");
    });
    let missing = explain("tun7", &io::Error::from_raw_os_error(nix::libc::ENOENT)).to_string();
    assert!(missing.contains("modprobe") || missing.contains("kernel module"), "{missing}");
    let forbidden = explain("tun7", &io::Error::from_raw_os_error(nix::libc::EPERM));
    assert_eq!(forbidden.kind(), io::ErrorKind::PermissionDenied);
    assert!(forbidden.to_string().contains("CAP_NET_ADMIN"), "{forbidden}");
}
