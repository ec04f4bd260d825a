//! What happens to the links of a namespace, as the kernel tells it (rtnetlink multicast): nothing is asked at intervals.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use nlink::netlink::OwnedEventStream;
use nlink::{NetworkEvent, RtnetlinkGroup};
use tokio_stream::{Stream, StreamExt};

use crate::error::HostError;
use crate::kernel::{self, Netlink};

/// News taken at once; more count as missed, and everything is looked up again.
const MAX_PENDING: usize = 1024;

/// What became of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkChange {
    /// Its name.
    pub interface: String,
    /// Whether it was not usable at some time since it was last: the kernel has forgotten its routes then, even if it
    /// is usable again.
    pub lost: bool,
    /// Whether it is there, up and carrying now.
    pub usable: bool,
}

/// What is known of a neighbour's link-layer address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// The interface it is looked for on.
    pub interface: String,
    /// Its address.
    pub address: IpAddr,
    /// Whether it has answered; else nobody has, and what was to go there was dropped.
    pub resolved: bool,
}

/// What has happened since the last time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LinkNews {
    /// Interfaces that came, went or were replaced.
    pub links: Vec<LinkChange>,
    /// Neighbours that answered, or did not.
    pub neighbours: Vec<Neighbour>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    name: String,
    usable: bool,
}

type Links = BTreeMap<u32, Known>;

enum Event {
    Link {
        index: u32,
        name: Option<String>,
        usable: bool,
    },
    /// Perhaps: a port that leaves a bridge is told like this, too.
    Gone,
    Neighbour {
        index: u32,
        address: IpAddr,
        resolved: bool,
    },
    /// The kernel had no room for some.
    Missed,
}

/// Follows the links of the calling thread's network namespace.
pub struct LinkWatch {
    events: OwnedEventStream<nlink::Route>,
    netlink: Netlink,
    /// By index.
    links: Links,
    pending: Vec<Event>,
}

impl LinkWatch {
    /// Begins to follow; what is there now is known when this returns.
    ///
    /// # Errors
    /// Netlink fails.
    pub async fn start() -> Result<Self, HostError> {
        let multicast = kernel::connect()?;
        multicast
            .subscribe(&[RtnetlinkGroup::Link, RtnetlinkGroup::Neigh])
            .map_err(|error| HostError::netlink("follow the interfaces", error))?;
        let events = multicast.into_events().await;
        let netlink = kernel::connect()?;
        // After the subscription: what comes in between is told twice, and nothing is missed.
        let links = dump(&netlink).await?;
        Ok(Self { events, netlink, links, pending: Vec::new() })
    }

    /// Opens the sockets again after an error. What was known before counts as lost.
    ///
    /// # Errors
    /// Netlink fails.
    pub async fn restart(&mut self) -> Result<(), HostError> {
        let new = Self::start().await?;
        (self.events, self.netlink) = (new.events, new.netlink);
        self.pending.push(Event::Missed);
        Ok(())
    }

    /// Whether an interface is there, up and carrying.
    pub fn is_usable(&self, interface: &str) -> bool {
        self.links.values().any(|link| link.usable && link.name == interface)
    }

    /// Waits until something has happened. Cancel-safe: what was told stays until it is returned.
    ///
    /// # Errors
    /// Netlink fails.
    pub async fn news(&mut self) -> Result<LinkNews, HostError> {
        loop {
            if self.pending.is_empty() {
                let event = self.events.next().await;
                self.note(event)?;
            }
            self.note_those_there()?;
            let of_links = |event: &Event| !matches!(event, Event::Neighbour { .. });
            let now = if self.pending.iter().any(of_links) {
                dump(&self.netlink).await?
            } else {
                self.links.clone()
            };
            let events = std::mem::take(&mut self.pending);
            let neighbours = events.iter().filter_map(|event| neighbour(event, &now)).collect();
            let news = LinkNews { links: compare(&self.links, &now, &events), neighbours };
            self.links = now;
            if news != LinkNews::default() {
                return Ok(news);
            }
        }
    }

    /// Takes what has come already.
    fn note_those_there(&mut self) -> Result<(), HostError> {
        let mut context = Context::from_waker(Waker::noop());
        while self.pending.len() < MAX_PENDING {
            match Pin::new(&mut self.events).poll_next(&mut context) {
                Poll::Ready(event) => self.note(event)?,
                Poll::Pending => return Ok(()),
            }
        }
        self.pending.clear();
        self.pending.push(Event::Missed);
        Ok(())
    }

    fn note(&mut self, event: Option<nlink::Result<NetworkEvent>>) -> Result<(), HostError> {
        let failed = |error| HostError::netlink("follow the interfaces", error);
        let event = match event {
            Some(Ok(NetworkEvent::NewLink(link))) => Event::Link {
                index: link.ifindex(),
                name: link.name().map(str::to_owned),
                usable: link.is_up() && link.is_running(),
            },
            Some(Ok(NetworkEvent::DelLink(_))) => Event::Gone,
            Some(Ok(NetworkEvent::NewNeighbor(neighbour))) => {
                let Some(address) = neighbour.destination() else { return Ok(()) };
                let (failed, reachable) = (neighbour.is_failed(), neighbour.is_reachable());
                if failed == reachable {
                    return Ok(());
                }
                Event::Neighbour { index: neighbour.ifindex(), address: *address, resolved: reachable }
            }
            Some(Ok(_)) => return Ok(()),
            Some(Err(error)) if error.is_no_buffer_space() => Event::Missed,
            Some(Err(error)) => return Err(failed(error)),
            None => return Err(HostError::Invalid("the kernel tells no more of the interfaces".to_owned())),
        };
        self.pending.push(event);
        Ok(())
    }
}

async fn dump(netlink: &Netlink) -> Result<Links, HostError> {
    let links =
        netlink.get_links().await.map_err(|error| HostError::netlink("list the interfaces", error))?;
    let known = |link: &nlink::netlink::messages::LinkMessage| {
        let usable = link.is_up() && link.is_running();
        Some((link.ifindex(), Known { name: link.name()?.to_owned(), usable }))
    };
    Ok(links.iter().filter_map(known).collect())
}

fn neighbour(event: &Event, links: &Links) -> Option<Neighbour> {
    let Event::Neighbour { index, address, resolved } = event else { return None };
    let interface = links.get(index)?.name.clone();
    Some(Neighbour { interface, address: *address, resolved: *resolved })
}

/// What has become of the links, by what they were, what they are and what was told in between.
fn compare(before: &Links, now: &Links, events: &[Event]) -> Vec<LinkChange> {
    let missed = events.iter().any(|event| matches!(event, Event::Missed));
    let mut lost: BTreeSet<&str> = BTreeSet::new();
    for (index, link) in before.iter().filter(|(_, link)| link.usable) {
        let told = events.iter().any(|event| match event {
            Event::Link { index: of, name, usable } => {
                of == index && (!usable || name.as_ref().is_some_and(|name| *name != link.name))
            }
            _ => false,
        });
        if missed || told || now.get(index) != Some(link) {
            lost.insert(&link.name);
        }
    }
    let usable = |links: &Links, name: &str| links.values().any(|link| link.usable && link.name == name);
    let came =
        now.values().filter(|link| link.usable && !usable(before, &link.name)).map(|link| link.name.as_str());
    let changed: BTreeSet<&str> = lost.iter().copied().chain(came).collect();
    let change = |name: &str| LinkChange {
        interface: name.to_owned(),
        lost: lost.contains(name),
        usable: usable(now, name),
    };
    changed.into_iter().map(change).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn links(list: &[(u32, &str, bool)]) -> Links {
        list.iter()
            .map(|(index, name, usable)| (*index, Known { name: (*name).to_owned(), usable: *usable }))
            .collect()
    }

    fn told(index: u32, name: &str, usable: bool) -> Event {
        Event::Link { index, name: Some(name.to_owned()), usable }
    }

    /// `name`: lost, usable.
    fn compared(
        before: &[(u32, &str, bool)],
        now: &[(u32, &str, bool)],
        events: &[Event],
    ) -> Vec<(String, bool, bool)> {
        let changes = compare(&links(before), &links(now), events);
        changes.into_iter().map(|change| (change.interface, change.lost, change.usable)).collect()
    }

    #[test]
    fn links_that_come_go_and_are_replaced_are_told_apart() {
        let up = [(1, "lo", true), (2, "eth1", true)];
        let change = |lost, usable| vec![("eth1".to_owned(), lost, usable)];
        assert_eq!(compared(&up, &up, &[told(2, "eth1", true)]), []);
        assert_eq!(compared(&up, &up[..1], &[Event::Gone]), change(true, false));
        assert_eq!(compared(&up[..1], &up, &[told(2, "eth1", true)]), change(false, true));
        // Gone and back before anybody looked: as another, or as the same that was down meanwhile.
        assert_eq!(compared(&up, &[up[0], (7, "eth1", true)], &[Event::Gone]), change(true, true));
        assert_eq!(compared(&up, &up, &[told(2, "eth1", false), told(2, "eth1", true)]), change(true, true));
        assert_eq!(compared(&up, &[up[0], (2, "eth1", false)], &[]), change(true, false));
        // Something came and went that nobody knew.
        assert_eq!(compared(&up, &up, &[told(9, "x", true), Event::Gone]), []);
        // A new name is another interface to who knows it by name.
        let renamed = compared(&up, &[up[0], (2, "eth2", true)], &[told(2, "eth2", true)]);
        assert_eq!(renamed, [("eth1".to_owned(), true, false), ("eth2".to_owned(), false, true)]);
        // Missed: whatever was there may have been away.
        let all = compared(&up, &up, &[Event::Missed]);
        assert_eq!(all, [("eth1".to_owned(), true, true), ("lo".to_owned(), true, true)]);
    }
}
