# The warm pool of the provider `python`, for scripts. `count` is the size of the pool.
#   nomad job run jobspecs/pool-python.nomad.hcl
#   nomad job scale polydev-pool-python pool 20

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
  default     = "polydev-python-sandbox:latest"
  description = "Image of the slots; pin it by version or digest in production."
}

variable "prepare_ahead" {
  type        = bool
  default     = false
  description = "Whether a slot's next container is made during the run in the current one."
}

variable "agent" {
  type        = bool
  default     = true
  description = "Whether a Python that has imported `imports` waits in every idle slot for a script."
}

variable "imports" {
  type = list(string)
  default = [
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "networkx",
    "numpy",
    "pandas",
    "polars",
  ]
  description = "Modules that scripts find imported."
}

variable "egress" {
  type        = list(string)
  default     = []
  description = "What scripts may reach: a list of hosts, or `internet`; `[]` for nothing."
}

job "polydev-pool-python" {
  type        = "service"
  priority    = 40
  datacenters = var.datacenters

  meta {
    provider = "python"
    purpose  = "warm-pool"
  }

  # Nomad starts the replacement of a slot only after the slot has ended. A slot with a
  # run in it ends when the run ends. Canaries do not wait for a predecessor. The job has
  # as many canaries as the pool has slots, and Nomad promotes them when they are warm.
  # So the pool is never empty during an update.
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

    # `nomad job scale` has the same limits as `polydev-shim pool scale`.
    scaling {
      min = 0
      max = 100
    }

    # When a node is drained, Nomad moves several slots at a time, but far fewer than a
    # node has.
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
      mode     = "fail" # With "delay", Nomad would never place the slot on another node.
    }

    # The pool returns to its size, however often its nodes or drivers fail.
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
          provider      = "python"
          image         = var.image
          prepare_ahead = var.prepare_ahead
          agent         = var.agent
          imports       = var.imports

          egress {
            allow = var.egress
          }
        }
      }

      # What an idle slot may use. A script in the slot gets the limits of the driver's
      # `python_class`.
      resources {
        cpu    = 100
        memory = 512
      }

      # The output of a run goes to its caller, so Nomad need not collect logs. Without
      # this setting the agent keeps a helper process for every slot.
      logs {
        disabled = true
      }
    }
  }
}
