# The warm pool of the provider `google`: `count` is its size.
#   nomad job run jobspecs/pool-google.nomad.hcl
#   nomad job scale polydev-pool-google pool 20

variable "count" {
  type        = number
  default     = 10
  description = "Warm slots to keep."
}

variable "datacenters" {
  type        = list(string)
  default     = ["*"]
  description = "Where the slots may be."
}

variable "image" {
  type        = string
  default     = "polydev-google-runtime:latest"
  description = "Image of the slots; pin it by version or digest in production."
}

variable "prepare_ahead" {
  type        = bool
  default     = false
  description = "Whether a slot's next container is made while a run goes on in this one."
}

job "polydev-pool-google" {
  type        = "service"
  priority    = 40
  datacenters = var.datacenters

  meta {
    provider = "google"
    purpose  = "warm-pool"
  }

  # A slot's replacement starts only after the slot has ended, and a slot with a run
  # in it ends when the run does. Canaries have no predecessor: as many as the pool
  # has slots, promoted when they are warm, keep it from ever being empty.
  update {
    max_parallel      = max(var.count, 1)
    canary            = max(var.count, 1)
    auto_promote      = true
    health_check      = "task_states"
    min_healthy_time  = "1s"
    healthy_deadline  = "10m"
    progress_deadline = "25h" # Longer than the longest run, 24 hours.
  }

  group "pool" {
    count = var.count

    # `nomad job scale` keeps to what `pool scale` allows.
    scaling {
      min = 0
      max = 100
    }

    # Far below a node's slots at a time, and not one by one.
    migrate {
      max_parallel     = 5
      health_check     = "task_states"
      min_healthy_time = "1s"
      healthy_deadline = "10m"
    }

    restart {
      attempts = 3
      interval = "5m"
      delay    = "15s"
      mode     = "fail" # With "delay" the slot would never be placed elsewhere.
    }

    # A pool comes back to its size, however often its nodes or drivers fail.
    reschedule {
      delay          = "30s"
      delay_function = "exponential"
      max_delay      = "2m"
      unlimited      = true
    }

    task "runtime" {
      driver       = "polydev"
      kill_timeout = "10s"
      kill_signal  = "SIGTERM"

      config {
        slot {
          provider      = "google"
          image         = var.image
          prepare_ahead = var.prepare_ahead
        }
      }

      # What an idle slot may use. A run in it gets the driver's run class.
      resources {
        cpu    = 100
        memory = 256
      }

      # The output of a run goes to its caller: without this the agent keeps a
      # helper process for every slot.
      logs {
        disabled = true
      }
    }
  }
}
