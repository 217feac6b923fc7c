"""The device that a virtual machine sees: guest memory, virtqueues, vhost-user-fs. Synchronous."""
