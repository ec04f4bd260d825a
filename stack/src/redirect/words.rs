//! What the machines tell, in words: for logs, captures and replay.

use std::fmt::{self, Display, Formatter};

use super::{ClientEvent, DeclineReason, PlainReason, RedirectOutcome, ServerEvent};

impl Display for ClientEvent {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            ClientEvent::Redirected { service_port, handover, .. } => {
                let how = if *handover { "handover" } else { "reconnect" };
                write!(f, "goes on at {service_port} by {how}")
            }
            ClientEvent::Confirmed { vip, .. } => write!(f, "confirmed at {}", vip.port()),
            ClientEvent::Plain { reason, .. } => write!(f, "goes on plainly: {reason}"),
            ClientEvent::HandoverFailed { service_port, .. } => {
                write!(f, "the handover to {service_port} failed")
            }
            ClientEvent::MoveAsked { from, to, .. } => write!(f, "asked to move from {from} to {to}"),
            ClientEvent::Hint { from, to, .. } => write!(f, "asked to move from {from} to {to}: it stays"),
            ClientEvent::Rebound { port, .. } => write!(f, "its own port is {port} from now on"),
            ClientEvent::RebindFailed { port, .. } => write!(f, "own port {port} was not confirmed"),
        }
    }
}

impl Display for PlainReason {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PlainReason::Unconfirmed => "the SYN-ACK has no C",
            PlainReason::Echoed => "the SYN-ACK has our own option",
            PlainReason::Refused => "the redirect is not to be obeyed",
            PlainReason::Silence => "nothing answers SYNs with the option",
            PlainReason::ServicePort => "the service port refuses or is silent",
        })
    }
}

impl Display for ServerEvent {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            ServerEvent::Answered { port, .. } => write!(f, "sent to {port}, to reconnect"),
            ServerEvent::HandedOver { port, .. } => write!(f, "sent to {port}, to hand over"),
            ServerEvent::Confirmed { moved_from: Some(from), .. } => {
                write!(f, "confirmed, moved from {from}")
            }
            ServerEvent::Confirmed { service, .. } => write!(f, "confirmed at {}", service.port()),
            ServerEvent::Redirection { to, outcome, .. } => write!(f, "move to {to}: {outcome}"),
            ServerEvent::Rebound { port, .. } => write!(f, "the client has port {port} from now on"),
            ServerEvent::Load { demanded: true } => f.write_str("tokens are demanded from now on"),
            ServerEvent::Load { demanded: false } => f.write_str("tokens are no longer demanded"),
            ServerEvent::Declined { reason, .. } => write!(f, "left plain: {reason}"),
        }
    }
}

impl Display for RedirectOutcome {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RedirectOutcome::Confirmed => "confirmed",
            RedirectOutcome::Closed => "closed without",
            RedirectOutcome::GivenUp => "given up",
            RedirectOutcome::Reset => "reset",
        })
    }
}

impl Display for DeclineReason {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DeclineReason::NotListening => "nobody listens on the service port",
            DeclineReason::TooManyHops => "redirected too often",
            DeclineReason::NoRoom => "no room for the option",
        })
    }
}
