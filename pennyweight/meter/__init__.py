"""What a run takes while it runs: device-seconds, energy and money, kept through kills."""
