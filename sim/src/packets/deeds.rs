//! What is done to a world, and which errors that explains.

use std::time::Duration;

use shunt_stack::redirect::OnRedirect;

use super::balancers::Standing;
use super::check::Violation;
use super::plan::{Deed, FlowPlan, ServerPlan};
use super::world::{Event, World};

impl World {
    pub(super) fn deed(&mut self, deed: Deed) -> Result<(), Violation> {
        let after = |millis: u64| self.now + Duration::from_millis(millis);
        match deed {
            Deed::Add(index) => {
                if self.standing[index].0 == Standing::Absent && !self.servers[index].dead {
                    self.standing[index].0 = Standing::Up;
                    self.change_tables();
                }
            }
            Deed::Drain(index) => self.drain(index),
            Deed::Weigh(index, weight) => {
                self.standing[index].1 = weight;
                self.change_tables();
            }
            Deed::Kill(index, seconds) => self.kill(index, seconds),
            Deed::RestartBalancer(index, millis) => {
                let at = after(millis);
                self.balancers.stop(index, self.now);
                self.schedule.at(at, Event::BalancerUp(index));
            }
            Deed::Reshuffle => self.balancers.reshuffle(),
            Deed::RestartShim(index, millis) => {
                let at = after(millis);
                if self.clients[index].machine.has_beside() {
                    self.clients[index].machine.stop_beside();
                    self.excuse_handovers(index);
                    self.schedule.at(at, Event::ShimUp(index));
                }
            }
            Deed::RestartAgent(index, millis) => {
                let at = after(millis);
                if self.servers[index].machine.has_beside() {
                    self.servers[index].machine.stop_beside();
                    self.schedule.at(at, Event::AgentUp(index));
                }
            }
            Deed::Rebind(index) => {
                if let Some(nat) = &mut self.clients[index].nat {
                    nat.forget();
                    self.ledger.excuse(false, |_, plan, _| plan.client == index);
                }
            }
            Deed::Move(from, to) => {
                self.servers[from].redirect_all(self.now, ServerPlan::service_port(to));
                return self.serve_server(from);
            }
            Deed::JumpClient(index, millis) => {
                self.clients[index].machine.jump(millis);
                return self.serve_client(index);
            }
            Deed::JumpServer(index, millis) => {
                self.servers[index].machine.jump(millis);
                return self.serve_server(index);
            }
        }
        Ok(())
    }

    /// A handover that is not complete is taken over like a redirected connection, and watched no more (C10, C12): where
    /// something in the path does not let it pass it ends by the TCP's own timer.
    fn excuse_handovers(&mut self, client: usize) {
        let plan = &self.plan.clients[client];
        if plan.nat.is_some() || plan.middlebox.is_some() {
            self.ledger.excuse(true, |_, plan, state| plan.client == client && state.last.is_none());
        }
    }

    /// A server is gone. What it had is lost, and what nobody else has heard of yet may have been its.
    fn kill(&mut self, index: usize, seconds: u64) {
        self.servers[index].dead = true;
        let server = index as u16;
        // A stream that may move may have its latest part there, and have said nothing yet.
        let clients = &self.plan.clients;
        let moves = |plan: &FlowPlan| clients[plan.client].on_redirect == OnRedirect::Follow;
        self.ledger
            .excuse(false, |_, plan, state| moves(plan) || state.last.is_none_or(|(of, _)| of == server));
        self.schedule.at(self.now + Duration::from_secs(seconds), Event::Leave(index, true));
    }
}
