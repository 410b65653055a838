# Slots of the provider `openai` that are made on demand: a shim dispatches one for a run
# that finds no warm slot idle. Without this job such runs wait for a warm one.
#   nomad job run jobspecs/on-demand-openai.nomad.hcl

variable "datacenters" {
  type        = list(string)
  default     = ["*"]
  description = "Where the slots may be."
}

variable "image" {
  type        = string
  default     = "polydev-openai-runtime:latest"
  description = "Image of the slots; pin it by version or digest in production."
}

job "polydev-on-demand-openai" {
  type        = "batch"
  priority    = 50
  datacenters = var.datacenters

  # Of the run nothing but its id is told to Nomad.
  parameterized {
    payload       = "forbidden"
    meta_required = ["run_id"]
  }

  meta {
    provider = "openai"
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
          provider = "openai"
          image    = var.image
          run_id   = "${NOMAD_META_run_id}"
        }
      }

      # What the run may use: the driver's run class.
      resources {
        cpu    = 500
        memory = 512
      }

      # The output of the run goes to its caller.
      logs {
        disabled = true
      }
    }
  }
}
