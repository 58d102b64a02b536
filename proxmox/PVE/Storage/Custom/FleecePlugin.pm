package PVE::Storage::Custom::FleecePlugin;

# A storage of Proxmox VE that is a repository of Fleece: lists, prunes and removes backups through `fleece provider`,
# and offers the backup provider that makes and restores them. docs/proxmox-provider.md.

use strict;
use warnings;

use Time::HiRes qw(clock_gettime CLOCK_MONOTONIC);

use PVE::BackupProvider::Plugin::Fleece;
use PVE::Fleece::Process;

use base qw(PVE::Storage::Plugin);

# Versions of the storage API that this was written for. Backup providers came with 11.
my ($OLDEST_API, $NEWEST_API) = (11, 15);

# Seconds for which the space of a storage is not asked for again: the status daemon asks every ten.
our $STATUS_AGE_S = 120;
# Seconds for it, and for which a failure is not looked into again: that daemon asks all storages in turn.
our $STATUS_LIMIT_S = 15;
our $FAILURE_AGE_S = 60;
# Seconds for what may have to look at everything there is.
our $LONG_LIMIT_S = 1800;

my $VOLUME = qr{backup/((vm|ct)/([1-9][0-9]{2,8})/[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z)};
my %GUEST_TYPE = (vm => 'qemu', ct => 'lxc');

my %status_of;

sub api {
    my $host = PVE::Storage->can('APIVER') ? PVE::Storage::APIVER() : $OLDEST_API;
    return $host < $OLDEST_API ? $OLDEST_API : $host > $NEWEST_API ? $NEWEST_API : $host;
}

sub type { return 'fleece' }

sub plugindata {
    return {
        content => [{ backup => 1, none => 1 }, { backup => 1 }],
        features => { 'backup-provider' => 1 },
        'sensitive-properties' => {},
    };
}

sub properties {
    return {
        'fleece-repository' => {
            description => 'Repository of Fleece: a name of its configuration or of a datastore, a folder, or'
                . ' [[user@realm[!token]@]host[:port]:]store.',
            type => 'string',
            maxLength => 1024,
        },
        'fleece-namespace' => {
            description => 'Namespace in the repository, a/b/c.',
            type => 'string',
            maxLength => 256,
        },
        'fleece-mechanism' => {
            description => 'How the disks of virtual machines are read.',
            type => 'string',
            enum => ['nbd', 'file-handle'],
            default => 'nbd',
        },
        'fleece-vm-restore' => {
            description => 'How the disks of virtual machines are handed over for a restore.',
            type => 'string',
            enum => ['file', 'nbd'],
            default => 'file',
        },
        'fleece-container-restore' => {
            description => 'How the files of containers are handed over for a restore.',
            type => 'string',
            enum => ['directory', 'tar'],
            default => 'directory',
        },
    };
}

sub options {
    return {
        'fleece-repository' => { fixed => 1 },
        'fleece-namespace' => { optional => 1 },
        'fleece-mechanism' => { optional => 1 },
        'fleece-vm-restore' => { optional => 1 },
        'fleece-container-restore' => { optional => 1 },
        nodes => { optional => 1 },
        shared => { optional => 1 },
        disable => { optional => 1 },
        content => { optional => 1 },
        'prune-backups' => { optional => 1 },
        'max-protected-backups' => { optional => 1 },
    };
}

sub new_backup_provider {
    my ($class, $scfg, $storeid, $log_function) = @_;
    return PVE::BackupProvider::Plugin::Fleece->new($class, $scfg, $storeid, $log_function);
}

sub _call {
    my ($scfg, $storeid, $name, $parameters, %options) = @_;
    my $storage = PVE::BackupProvider::Plugin::Fleece::storage($scfg, $storeid);
    return PVE::Fleece::Process::call($name, { storage => $storage, %$parameters }, %options);
}

# --- the storage ------------------------------------------------------------------------------------------------------

sub status {
    my ($class, $storeid, $scfg, $cache) = @_;
    my $now = clock_gettime(CLOCK_MONOTONIC);
    my $known = $status_of{$storeid};
    if (!$known || $known->{of} ne _identity($scfg) || $now >= $known->{until}) {
        my $space = eval {
            my $found = _call($scfg, $storeid, 'storage-status', {}, limit => $STATUS_LIMIT_S);
            [map { PVE::Fleece::Process::number_in($found, $_) } qw(total available used)];
        };
        my $failure = $@;
        my $age_s = $space ? $STATUS_AGE_S : $FAILURE_AGE_S;
        $known = $status_of{$storeid} =
            { of => _identity($scfg), until => $now + $age_s, space => $space, failure => $failure };
    }
    die $known->{failure} if !$known->{space};
    return (@{ $known->{space} }, 1);
}

sub _identity {
    my ($scfg) = @_;
    return join("\0", map { $scfg->{$_} // '' } qw(fleece-repository fleece-namespace));
}

sub activate_storage { return 1 }
sub deactivate_storage { return 1 }
sub activate_volume { return 1 }
sub deactivate_volume { return 1 }

sub parse_volname {
    my ($class, $volname) = @_;
    die "unable to parse the volume name '$volname' of Fleece\n" if $volname !~ m{\A$VOLUME\z};
    return ('backup', $1, int($3), undef, undef, undef, "fleece-$2");
}

sub path {
    my ($class, $scfg, $volname, $storeid, $snapname) = @_;
    die "a backup has no snapshots\n" if defined($snapname);
    my ($kind, $name, $vmid) = $class->parse_volname($volname);
    my $path = "fleece:$scfg->{'fleece-repository'}:$name";
    return wantarray ? ($path, $vmid, $kind) : $path;
}

sub filesystem_path { my ($class, $scfg, $volname) = @_; return $class->path($scfg, $volname) }

sub get_subdir { die "a storage of Fleece has no folders\n" }
sub alloc_image { die "a storage of Fleece holds backups only\n" }
sub clone_image { die "a storage of Fleece holds backups only\n" }
sub create_base { die "a storage of Fleece holds backups only\n" }
sub volume_resize { die "a backup cannot be resized\n" }
sub volume_snapshot { die "a backup cannot have snapshots\n" }
sub volume_snapshot_rollback { die "a backup cannot have snapshots\n" }
sub volume_snapshot_delete { die "a backup cannot have snapshots\n" }
sub volume_has_feature { return undef }
sub list_images { return [] }
sub volume_export_formats { return () }
sub volume_import_formats { return () }

# --- its backups ------------------------------------------------------------------------------------------------------

sub list_volumes {
    my ($class, $storeid, $scfg, $vmid, $content_types) = @_;
    return [] if !grep { $_ eq 'backup' } @$content_types;
    my $found = _call($scfg, $storeid, 'list-volumes', { defined($vmid) ? (vmid => int($vmid)) : () });
    return [map { _entry($storeid, $_) } @{ PVE::Fleece::Process::part_of($found, 'volumes', 'ARRAY') }];
}

# What a volume that is listed is called, of which guest and of when.
sub _named {
    my ($storeid, $volume) = @_;
    my $volname = 'backup/' . PVE::Fleece::Process::text_in($volume, 'archive-name', qr{[^\x00-\x20]+});
    die "fleece: it lists an impossible archive\n" if $volname !~ m{\A$VOLUME\z};
    my ($type, $vmid) = ($2, $3);
    my $named = {
        volid => "$storeid:$volname",
        vmid => int($vmid),
        ctime => PVE::Fleece::Process::number_in($volume, 'ctime'),
    };
    return ($named, $type);
}

sub _entry {
    my ($storeid, $volume) = @_;
    my ($entry, $type) = _named($storeid, $volume);
    $entry->{format} = "fleece-$type";
    $entry->{subtype} = $GUEST_TYPE{$type};
    $entry->{content} = 'backup';
    $entry->{size} = PVE::Fleece::Process::number_in($volume, 'size');
    $entry->{protected} = 1 if $volume->{protected};
    my $notes = _notes($volume);
    $entry->{notes} = $notes if length($notes);
    $entry->{encrypted} = PVE::Fleece::Process::text_in($volume, 'encrypted', qr/[0-9a-f:]+/)
        if defined($volume->{encrypted});
    if (ref($volume->{verification}) eq 'HASH') {
        $entry->{verification} = {
            state => PVE::Fleece::Process::text_in($volume->{verification}, 'state', qr/ok|failed/),
            upid => PVE::Fleece::Process::text_in($volume->{verification}, 'upid', qr/[^\x00-\x20]*/),
        };
    }
    return $entry;
}

sub _notes {
    my ($volume) = @_;
    my $notes = $volume->{notes} // '';
    die "fleece: the answer has no usable 'notes'\n" if ref($notes) || $notes !~ m/\A(.*)\z/s;
    return $1;
}

sub _about {
    my ($class, $scfg, $storeid, $volname) = @_;
    my (undef, $name) = $class->parse_volname($volname);
    return _call($scfg, $storeid, 'volume', { 'archive-name' => $name });
}

sub volume_size_info {
    my ($class, $scfg, $storeid, $volname, $timeout) = @_;
    my $format = ($class->parse_volname($volname))[6];
    my $size = PVE::Fleece::Process::number_in($class->_about($scfg, $storeid, $volname), 'size');
    return wantarray ? ($size, $format, $size, undef) : $size;
}

sub get_volume_attribute {
    my ($class, $scfg, $storeid, $volname, $attribute) = @_;
    return undef if $attribute ne 'notes' && $attribute ne 'protected';
    my $found = $class->_about($scfg, $storeid, $volname);
    return $attribute eq 'notes' ? _notes($found) : $found->{protected} ? 1 : 0;
}

sub update_volume_attribute {
    my ($class, $scfg, $storeid, $volname, $attribute, $value) = @_;
    my (undef, $name) = $class->parse_volname($volname);
    my $changed = $attribute eq 'notes' ? { notes => _characters($value) }
        : $attribute eq 'protected' ? { protected => PVE::Fleece::Process::boolean($value) }
        : die "the attribute '$attribute' is not supported by storages of the type fleece\n";
    _call($scfg, $storeid, 'update-volume', { 'archive-name' => $name, %$changed });
    return;
}

# A text whose characters, not bytes, go into the JSON.
sub _characters {
    my ($text) = @_;
    $text //= '';
    utf8::decode($text) if !utf8::is_utf8($text);
    return $text;
}

sub get_volume_notes {
    my ($class, $scfg, $storeid, $volname, $timeout) = @_;
    return $class->get_volume_attribute($scfg, $storeid, $volname, 'notes');
}

sub update_volume_notes {
    my ($class, $scfg, $storeid, $volname, $notes, $timeout) = @_;
    return $class->update_volume_attribute($scfg, $storeid, $volname, 'notes', $notes);
}

sub free_image {
    my ($class, $storeid, $scfg, $volname, $isBase) = @_;
    my (undef, $name) = $class->parse_volname($volname);
    _call($scfg, $storeid, 'remove-volume', { 'archive-name' => $name });
    return undef; # no worker
}

sub prune_backups {
    my ($class, $scfg, $storeid, $keep, $vmid, $type, $dryrun, $logfunc) = @_;
    $logfunc //= sub { };
    my %kept = map { m/\Akeep-(last|hourly|daily|weekly|monthly|yearly)\z/ && $keep->{$_} ? ($1 => int($keep->{$_})) : () }
        keys(%$keep);
    my $found = _call(
        $scfg, $storeid, 'prune-backups',
        {
            keep => $keep->{'keep-all'} ? {} : \%kept,
            defined($vmid) ? (vmid => int($vmid)) : (),
            defined($type) ? (vmtype => "$type") : (),
            'dry-run' => PVE::Fleece::Process::boolean($dryrun),
        },
        limit => $LONG_LIMIT_S,
    );
    my ($list, $failed) = ([], 0);
    for my $decision (@{ PVE::Fleece::Process::part_of($found, 'decisions', 'ARRAY') }) {
        my ($entry, $kind) = _named($storeid, $decision);
        my $mark = PVE::Fleece::Process::text_in($decision, 'mark', qr/keep|remove|protected/);
        push @$list, { %$entry, type => $GUEST_TYPE{$kind}, mark => $mark };
        if (defined($decision->{error})) {
            $failed = 1;
            $logfunc->('err', "$entry->{volid}: " . PVE::Fleece::Process::_shown("$decision->{error}"));
        } else {
            $logfunc->('info', "$mark $entry->{volid}");
        }
    }
    die "not all backups could be removed\n" if $failed;
    return $list;
}

1;
