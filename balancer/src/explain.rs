//! Decisions in words: the name they are counted under, the rule, and whom they concern.

use std::fmt;

use crate::Balancer;
use crate::forward::Output;
use crate::route::{Decision, DropReason, Route};
use crate::table::ServerId;

/// A decision about one packet. Its text is `selected (B1): server web-1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// The name under which it is counted.
    pub name: &'static str,
    /// The rule of PROTOCOL.md.
    pub rule: &'static str,
    /// The server, or why the packet is dropped; may be empty.
    pub why: String,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Explanation { name, rule, why } = self;
        write!(f, "{name} ({rule})")?;
        if why.is_empty() { Ok(()) } else { write!(f, ": {why}") }
    }
}

impl Balancer {
    /// What [`decide`](Self::decide) said of a packet, and [`carry_out`](Self::carry_out) did with it.
    pub fn explain(&self, route: Result<Route, DropReason>, done: Result<Output, DropReason>) -> Explanation {
        match (route, done) {
            (Ok(route), Ok(_)) => {
                Explanation { name: route.name(), rule: route_rule(route), why: self.whom(route) }
            }
            (Err(reason), _) | (_, Err(reason)) => Explanation {
                name: reason.name(),
                rule: drop_rule(reason),
                why: format!("dropped: {reason}"),
            },
        }
    }

    fn whom(&self, route: Route) -> String {
        let name = |server: ServerId| self.server_name(server).unwrap_or("?");
        match route {
            Route::ToServer { server, decision: Decision::Default(reason) } => {
                format!("default server {}, because of {reason}", name(server))
            }
            Route::ToServer { server, .. } => format!("server {}", name(server)),
            Route::ToClient { server, .. } => format!("of server {}", name(server)),
            Route::ErrorToClient { server, .. } => format!("about a packet for server {}", name(server)),
            Route::Redirect { server, port } => format!("server {}, port {port}", name(server)),
            Route::TooBig { mtu } => format!("{mtu} bytes would fit"),
            Route::Answer | Route::Unchanged => String::new(),
        }
    }
}

fn route_rule(route: Route) -> &'static str {
    match route {
        Route::ToServer { decision, .. } => match decision {
            Decision::Selected => "B1",
            Decision::Owner => "B2",
            Decision::LegacyHash | Decision::LegacyServer => "B3",
            Decision::Datagram => "§6",
            Decision::Fragment => "§9",
            Decision::Balanced | Decision::Named => "I4",
            Decision::ErrorOwner | Decision::ErrorHash | Decision::ErrorLegacyServer => "I1",
            Decision::Default(_) => "B4",
        },
        Route::ToClient { .. } | Route::Unchanged => "B5",
        Route::ErrorToClient { .. } => "I5",
        Route::Answer => "I4",
        Route::Redirect { .. } => "B1",
        Route::TooBig { .. } => "I3",
    }
}

fn drop_rule(reason: DropReason) -> &'static str {
    match reason {
        DropReason::NoServer(_) | DropReason::NoPortlessServer(_) | DropReason::NoConnector(_) => "B7",
        DropReason::Legacy(_) => "B3",
        DropReason::LaterFragment(_) | DropReason::OverlappingFragment(_) => "§9",
        DropReason::Unanswerable | DropReason::AnswerLimit => "I4",
        DropReason::Limited(_) => "B6",
        DropReason::TooBig(_) | DropReason::Tunnel(_) => "I3",
        DropReason::Token(_) => "T4",
        _ => "B4",
    }
}
