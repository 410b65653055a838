# Slots on demand of the provider `anthropic`. A shim dispatches this job for a run that finds
# no idle warm slot. Without this job, such a run waits for a warm slot.
#   nomad job run jobspecs/on-demand-anthropic.nomad.hcl

variable "datacenters" {
  type        = list(string)
  default     = ["*"]
  description = "Where the slots may be."
}

variable "image" {
  type        = string
  default     = "polydev-anthropic-runtime:latest"
  description = "Image of the slots; pin it by version or digest in production."
}

variable "base_url" {
  type        = string
  default     = ""
  description = "Where model requests go, in place of the provider's own API."
}

variable "egress" {
  type        = list(string)
  default     = ["internet"]
  description = "What the slots may reach beside their model: `internet`, or a list of hosts; `[]` for nothing."
}

job "polydev-on-demand-anthropic" {
  type        = "batch"
  priority    = 50
  datacenters = var.datacenters

  # Nomad receives only the id of the run.
  parameterized {
    payload       = "forbidden"
    meta_required = ["run_id"]
  }

  meta {
    provider = "anthropic"
    purpose  = "on-demand"
  }

  group "slot" {
    restart {
      attempts = 0
      mode     = "fail"
    }

    reschedule {
      attempts  = 0
      unlimited = false
    }

    task "runtime" {
      driver       = "polydev"
      kill_timeout = "30s"
      kill_signal  = "SIGTERM"

      config {
        slot {
          provider = "anthropic"
          image    = var.image
          run_id   = "${NOMAD_META_run_id}"

          upstream {
            base_url = var.base_url
          }

          egress {
            allow = var.egress
          }
        }
      }

      # What the run may use: the same as the driver's `run_class`.
      resources {
        cpu    = 500
        memory = 512
      }

      # The output of the run goes to its caller, so Nomad need not collect logs.
      logs {
        disabled = true
      }
    }
  }
}
