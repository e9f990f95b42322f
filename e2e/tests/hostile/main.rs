//! One hostile guest or frontend against everybody else: whatever it does, the others' frames flow, the switch says
//! what was wrong, and the port is of use again once its guest behaves.

mod chains;
mod frontends;
mod messages;
mod offloads;
mod random;
mod rings;
mod vcpu;
